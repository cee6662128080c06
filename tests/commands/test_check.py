"""`python -m lit_opd check`: what it says of right and wrong estimators, and with which exit code."""

import re
import subprocess
import sys

import pytest

from lit_opd import estimators
from lit_opd.cli import main
from lit_opd.estimators.oracle.laws import LAWS, cases

MINE = '''
import torch
from lit_opd import register_estimator
from lit_opd.functional import upcast
from lit_opd.functional.returns import return_to_go
from lit_opd.types import Estimate


def parts(tokens):
    student_logps = upcast(tokens.student_logps_BT)
    return student_logps, student_logps.detach() - upcast(tokens.teacher_logps_BT)


@register_estimator("checked_bounded", target="reverse_kl", source="me")
def bounded(tokens, *, bound=0.5):
    """Sampled reverse KL, [bounded]."""
    student_logps, log_ratio = parts(tokens)
    return Estimate(log_ratio.clamp(-bound, bound) * student_logps, log_ratio)


def half_square(tokens):
    """Half the square of the log-ratio."""
    log_ratio = upcast(tokens.student_logps_BT) - upcast(tokens.teacher_logps_BT)
    return Estimate(log_ratio.square() / 2, log_ratio.detach())


@register_estimator("checked_sign_flip", target="reverse_kl", unbiased=True)
def sign_flip(tokens):
    student_logps, log_ratio = parts(tokens)
    return Estimate(-log_ratio * student_logps, log_ratio)


@register_estimator("checked_modest", target="reverse_kl", unbiased=False)
def modest(tokens):
    student_logps, log_ratio = parts(tokens)
    return Estimate(log_ratio * student_logps, log_ratio)


@register_estimator("checked_leak", family="sequence", target="sequence_reverse_kl", unbiased=True)
def mask_leak(tokens):
    student_logps, log_ratio = parts(tokens)
    return Estimate(return_to_go(log_ratio, 1.0) * student_logps, log_ratio)


@register_estimator("checked_noise", at_equal="expectation")
def log_ratio_as_loss(tokens):
    log_ratio = upcast(tokens.student_logps_BT) - upcast(tokens.teacher_logps_BT)
    return Estimate(log_ratio, log_ratio.detach())


@register_estimator("checked_reward", needs="full", on_policy=True)
def kl_as_reward(tokens):
    student, teacher = upcast(tokens.student_full_logps_BTV), upcast(tokens.teacher_full_logps_BTV)
    kl = (student.exp() * (student - teacher)).sum(-1).detach()
    return Estimate(kl * upcast(tokens.student_logps_BT), kl)


def doubled(tokens):
    student_logps, log_ratio = parts(tokens)
    return Estimate(2 * log_ratio * student_logps, log_ratio)


@register_estimator("checked_whitened", family="sequence")
def whitened(tokens):
    student_logps, log_ratio = parts(tokens)
    counted = torch.where(tokens.mask_BT, log_ratio, 0.0)
    return Estimate(counted / counted.norm(dim=-1, keepdim=True).clamp(min=1e-8) * student_logps, log_ratio)


def nothing(tokens):
    student_logps, log_ratio = parts(tokens)
    return Estimate(0.0 * student_logps, log_ratio)


def averaged(tokens):
    student_logps, log_ratio = parts(tokens)
    return Estimate((log_ratio * student_logps).mean(), log_ratio)


def undeclared(tokens):
    student_logps, log_ratio = parts(tokens)
    return Estimate((log_ratio - tokens.kl_BT) * student_logps, log_ratio)


def without_family(tokens):
    student_logps, log_ratio = parts(tokens)
    return Estimate(log_ratio * student_logps * tokens.rewards_B[:, None], log_ratio)


def misspelt(tokens):
    return Estimate(tokens.teacher_topk.sum(-1), tokens.kl_BT)


def a_tensor(tokens):
    student_logps, log_ratio = parts(tokens)
    return log_ratio * student_logps


def upside_down(tokens):
    student_logps, log_ratio = parts(tokens)
    return Estimate(-2 * log_ratio * student_logps, log_ratio)


def only_four_rows(tokens):
    if tokens.mask_BT.dim() == 2 and len(tokens.mask_BT) > 4:
        raise ValueError("too many rows")
    return half_square(tokens)


def needy(tokens, *, level):
    return half_square(tokens)
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def check(capsys, *words):
    code = main(["check", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def row(out, key):
    """The cell beside a key, its lines joined."""
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"  {key}"))
    rest = lines[first + 1 :]
    end = next((i for i, line in enumerate(rest) if not line.startswith("      ")), len(rest))
    return " ".join(" ".join([lines[first].removeprefix(f"  {key}"), *rest[:end]]).split())


def cells(out, target):
    return next(line for line in out.splitlines() if line.strip().startswith(target + " ")).split()[1:]


def test_registered_estimator_is_said_to_be_what_it_is(capsys):
    code, out, err = check(capsys, "k3_loss")
    assert (code, err) == (0, "")
    assert row(out, "aims at") == "the gradient of forward_kl, unbiased"
    assert row(out, "expected") == "its expected gradient is that of forward_kl (cosine 1.000000, norm ratio 1.000)"
    assert row(out, "held").count(",") == len(LAWS) - 1
    assert "BROKEN" not in out
    assert cells(out, "forward_kl") == ["1.000000", "1.000", "0"]
    assert 0 < float(cells(out, "reverse_kl")[0]) < 1
    assert row(out, "at p = q") == "a gradient that is zero for every sample"
    assert row(out, "samples") == "the factor of log p depends on which token was sampled, as it must"
    assert max(map(len, out.splitlines())) <= 100


def test_sampled_reverse_kl_is_its_own_yardstick(capsys):
    _, out, _ = check(capsys, "token")
    assert row(out, "variance") == "1 times that of the sampled reverse KL"
    _, out, _ = check(capsys, "full_vocab")
    assert float(row(out, "variance").split()[0]) < 1
    assert row(out, "samples").startswith("none: it learns from distributions")


def test_keywords_choose_what_is_checked(capsys):
    _, out, _ = check(capsys, "full_vocab", "divergence=jsd", "teacher_weight=0.1")
    assert out.startswith("full_vocab divergence=jsd teacher_weight=0.1\n")
    assert row(out, "expected").startswith("its expected gradient is that of jsd")
    assert "sets of keywords" not in out
    _, out, _ = check(capsys, "full_vocab")
    assert f"Laws with {len(cases(estimators.get('full_vocab')))} sets of keywords" in out


def test_support_is_small_unless_chosen(capsys):
    _, out, _ = check(capsys, "teacher_topk")
    assert "(4 tokens, up to 3 positions)" in out
    code, out, _ = check(capsys, "teacher_topk", "k=5")
    assert code == 0
    assert "(7 tokens, up to 2 positions)" in out


def test_function_of_ones_own_declares_nothing(mine, capsys):
    code, out, err = check(capsys, "mine.py:half_square")
    assert (code, err) == (0, "")
    assert row(out, "is") == "Half the square of the log-ratio."
    assert row(out, "declares").startswith("nothing, as it is not registered")
    assert row(out, "expected").startswith("its expected gradient is that of reverse_kl")
    assert row(out, "held").count(",") == len(LAWS) - 3  # all but those on what is declared


def test_registered_function_of_ones_own_takes_keywords(mine, capsys):
    code, out, _ = check(capsys, "mine.py:bounded", "bound=0.25")
    assert code == 0
    assert out.startswith("checked_bounded bound=0.25\n")
    assert row(out, "is") == "Sampled reverse KL, [bounded]."
    assert "none of these; the nearest is that of" in row(out, "expected")
    code, _, err = check(capsys, "mine.py:bounded", "bound=100")
    assert code == 1
    assert "breaks 1 of 18 laws: bias_is_as_declared" in err


@pytest.mark.parametrize(("name", "law", "how"), [
    ("sign_flip", "bias_is_as_declared", "off by 200.0% of its norm"),
    ("modest", "bias_is_as_declared", "say unbiased=True"),
    ("mask_leak", "masked_garbage_has_no_effect", "garbage at masked positions of student_logps_BT changes the loss"),
    ("averaged", "returns_one_value_a_position", "of shape [4, 5], one value a position and finds shape []"),
    ("undeclared", "works_on_what_it_needs", "what it declares to need (token) it raises TypeError"),
    ("undeclared", "works_on_what_it_needs", "kl_BT is empty, for it was not asked for: register_estimator(..., "
                                             "needs='token+kl')"),
    ("without_family", "works_on_what_it_needs", "rewards_B is empty, for it was not asked for: register_estimator("
                                                 "..., family='sequence', needs='token+rewards')"),
    ("misspelt", "works_on_what_it_needs", "no attribute 'teacher_topk'. A TokenBatch has student_logps_BT, teacher_"),
    ("a_tensor", "works_on_what_it_needs", "it returns a Tensor: return an Estimate(loss_BT=..., kl_BT=...) of"),
])  # fmt: skip
def test_wrong_estimator_fails_and_the_law_is_named(mine, capsys, name, law, how):
    code, out, err = check(capsys, f"mine.py:{name}")
    assert code == 1
    assert err.startswith(f"failed: mine.py:{name} breaks ")
    assert law in err
    assert err.count("\n") == 1
    assert how in " ".join(out.split())
    assert law.replace("_", " ") not in " ".join(out.split())
    assert ("  held" in out) == (law != "works_on_what_it_needs")  # nothing else was asked of what does not work


@pytest.mark.parametrize(("name", "identity"), [("log_ratio_as_loss", "I1"), ("kl_as_reward", "I6")])
def test_dead_gradient_fails_though_all_laws_hold(mine, capsys, name, identity):
    code, out, err = check(capsys, f"mine.py:{name}")
    assert code == 1
    assert "BROKEN" not in out
    assert err.startswith(f"failed: mine.py:{name} trains nothing: its expected gradient is zero")
    assert err.endswith(f"(identity {identity}).\n")
    assert "(identity I6)" in row(out, "samples")
    assert cells(out, "reverse_kl") == ["0.000000", "0.000", "1"]


def test_a_sign_that_is_wrong_fails_and_is_told(mine, capsys):
    code, out, err = check(capsys, "mine.py:upside_down")
    told = "has the opposite of the gradient of reverse_kl: a sign is wrong (cosine -1.000000, norm ratio 2.000)"
    assert (code, err) == (1, f"failed: mine.py:upside_down {told}.\n")
    assert row(out, "expected") == f"it {told}"
    assert "BROKEN" not in out  # it declares nothing, and breaks no law


def test_keywords_are_shown_with_their_defaults(mine, capsys):
    _, out, _ = check(capsys, "clipped_log_ratio", "max_log_ratio=0.3")
    assert re.search(r"^  max_log_ratio +float +5\.0 +c, nats", out, re.MULTILINE)
    assert row(check(capsys, "token")[1], "keywords") == "none"


def test_loss_without_any_gradient_fails(mine, capsys):
    code, _, err = check(capsys, "mine.py:nothing")
    assert (code, err) == (1, "failed: mine.py:nothing trains nothing: no sample has a gradient.\n")


def test_direction_and_length_are_told_apart(mine, capsys):
    _, out, _ = check(capsys, "mine.py:doubled")
    assert row(out, "expected") == (
        "its expected gradient points exactly along that of reverse_kl, at another length (cosine 1.000000, norm ratio "
        "2.000)"
    )


def test_lost_scale_is_told(mine, capsys):
    code, out, _ = check(capsys, "mine.py:whitened")
    assert code == 0
    assert row(out, "scale").startswith("twice the log-ratios give the same gradient")
    assert "  scale" not in check(capsys, "token")[1]


def test_learning_from_demonstrations_is_not_training_nothing(capsys):
    code, out, _ = check(capsys, "supervised")
    assert code == 0
    assert row(out, "expected").startswith("zero over the student's own completions")


def test_estimator_that_fails_on_small_models_only(mine, capsys):
    code, out, err = check(capsys, "mine.py:only_four_rows")
    assert code == 1
    assert "raises ValueError on small models: too many rows" in err
    assert "Gradient" not in out


def test_variants_are_held_to_their_contracts(mine, capsys, monkeypatch):
    check(capsys, "mine.py:bounded")
    spec = estimators.get("checked_bounded")
    wrong = estimators.Variant({"bound": 0.1}, "a wrong claim", unbiased=True)
    estimators.registry._REGISTRY["checked_bounded"] = type(spec)(**{**vars(spec), "variants": (wrong,)})
    code, out, err = check(capsys, "checked_bounded")
    assert code == 1
    assert "bias_is_as_declared (with bound=0.1): it declares" in " ".join(out.split())
    assert "checked_bounded breaks 1 of 18 laws" in err


@pytest.mark.parametrize(("words", "key", "text"), [
    ("tokn", "estimator.name", "Did you mean 'token'?"),
    ("missing.py:f", "estimator.name", "no file 'missing.py'"),
    ("mine.py:half_sqare", "estimator.name", "Did you mean 'half_square'?"),
    ("mine.py:bounded bounds=3", "estimator.kwargs.bounds", "Did you mean 'bound'?"),
    ("mine.py:needy", "estimator.kwargs", "'level'"),
    ("hybrid gamma=2", "estimator.kwargs", "gamma must lie in [0, 1], found 2"),
    ("hybrid gamma", "gamma", "key=value"),
    ("hybrid gamma=[1", "gamma", "a value in YAML"),
    ("hybrid --gamma", "command line", "'--gamma'"),
    ("", "command line", "required: NAME|FILE.py:FUNCTION"),
])  # fmt: skip
def test_mistake_is_told_in_one_line(mine, capsys, words, key, text):
    code, out, err = check(capsys, *words.split())
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {key}: expected")
    assert text in line


def test_in_a_process_of_its_own_it_needs_neither_lightning_nor_mlflow(mine):
    program = (
        "import sys; from lit_opd.cli import main; code = main(['check', *sys.argv[1:]]); "
        "print([name for name in ('lightning', 'mlflow', 'transformers') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, "mine.py:sign_flip"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "[]"
    assert "\x1b" not in done.stdout
    assert done.stderr.startswith("failed: ")
