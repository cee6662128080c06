import json
import math
import platform
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        patch.chdir(ROOT)
        import tools.benchmark.__main__ as cli
        from tools.benchmark import (
            growth,
            head,
            head_cases,
            ours,
            phases,
            processes,
            report,
            roofline,
            turns,
            workloads,
        )

        yield types.SimpleNamespace(
            cli=cli, growth=growth, head=head, head_cases=head_cases, ours=ours, phases=phases, processes=processes,
            report=report, roofline=roofline, turns=turns, workloads=workloads,
        )  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, attn_implementation="eager", bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def geometry(bench, llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama.config.save_pretrained(folder)
    return bench.roofline.read_geometry(folder)


def step(seconds, tokens, completions=4, **phases):
    return {"step_s": seconds, "tokens": tokens, "completions": completions, "reverse_kl": 1.0, **phases}


# --- the roofline


def test_the_parameters_of_a_geometry_are_those_of_the_model(llama, geometry):
    assert geometry.parameters == sum(p.numel() for p in llama.parameters())


def test_the_flops_of_a_geometry_are_those_torch_counts(llama, geometry):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        llama.model(input_ids=torch.zeros(2, 7, dtype=torch.long))
    # Eager attention multiplies with the masked positions too, so that every token attends to all seven.
    rotary = 2 * 2 * 7 * geometry.head_size // 2 // 2  # the table of angles, an outer product, once for both rows
    assert counter.get_total_flops() == pytest.approx(geometry.body_flops(14, 7), abs=2 * rotary)


def test_the_limit_is_what_one_computes_by_hand(bench):
    # One layer: attention 4 products of 2 x 2, and 3 of 2 x 3: W = 34. Head 5 x 2 = 10. With 3 norms of 2: 50.
    model = bench.roofline.Geometry(layers=1, hidden=2, intermediate=3, heads=1, kv_heads=1, head_size=2, vocabulary=5)
    products = {"body": 1.0, "logits": 2.0, "hidden_gradient": 4.0, "weight_gradient": 8.0}
    limit = bench.roofline.Limit(model, model, {"bf16": products, "read": 0.5, "copy": 10.0})
    # 4 rows, 2 completions of a prompt, 6 prompt tokens, 3 new ones: 12 prompt tokens and 8 others go through a body.
    seconds = limit.seconds(bench.roofline.Step(rows=4, completions=2, prompt=6, new=3))
    prompts, others = 12 * (2 * 34 + 4 * 2 * 3), 8 * (2 * 34 + 4 * 2 * 7.5)
    prefill = 50 * 6 / 10 + prompts + 4 * 2 * 10
    # A token's products, 4 x (68 + 60) + 80 = 592, are faster than reading 2 x 44 and (12 + 6) x 2 x 2 x 2 bytes by
    # half a byte a second: 464.
    assert seconds["rollout_s"] == pytest.approx(prefill + 2 * max(592, 464))
    assert seconds["teacher_s"] == pytest.approx(prompts + others)
    assert seconds["student_s"] == pytest.approx(3 * (prompts + others))
    # 12 positions, 240 FLOPs a product: two at 2, one at 4; one at 8 against 40 bytes at 10.
    assert seconds["head_s"] == pytest.approx(480 / 2 + 240 / 4 + 240 / 8)
    assert seconds["optimizer_s"] == pytest.approx(50 * 32 / 10)
    assert seconds["step_s"] == pytest.approx(sum(v for name, v in seconds.items() if name != "step_s"))
    assert bench.roofline.least_mb(model, model) == pytest.approx((50 * 16 + 50 * 2) / 1e6)


def test_a_machine_slow_at_memory_decodes_at_the_speed_of_its_memory(bench, geometry):
    products = dict.fromkeys(("body", "logits", "hidden_gradient", "weight_gradient"), math.inf)
    limit = bench.roofline.Limit(geometry, geometry, {"bf16": products, "read": 1.0, "copy": math.inf})
    cache = 2 * 3 * 2 * 4 * 2  # keys and values, layers, key-value heads, head size, bytes
    moved = 2 * (geometry.body_weights + 40 * 24) + cache * (10 + 2 * 4)
    assert limit.seconds(bench.roofline.Step(2, 2, 10, 8))["step_s"] == pytest.approx(7 * moved)


def test_every_rate_of_the_limit_is_measured(bench, geometry):
    shape = bench.roofline.Step(2, 1, 5, 4)
    from tools.benchmark import rates

    found = rates.measure({"shapes": bench.roofline.shapes(geometry, shape), "tries": 1})
    seconds = bench.roofline.Limit(geometry, geometry, bench.turns.best_rates([found, found]))
    assert all(value > 0 for value in seconds.seconds(shape).values())


def test_of_two_measurements_the_higher_rates_count_and_failures_do_not(bench):
    low = {"bf16": {"body": 1.0}, "fp32": {"body": 4.0}, "read": 2.0, "copy": 9.0, "threads": 2}
    high = {"bf16": {"body": 3.0}, "fp32": {"body": 1.0}, "read": 5.0, "copy": 6.0, "threads": 2}
    best = {"bf16": {"body": 3.0}, "fp32": {"body": 4.0}, "read": 5.0, "copy": 9.0, "threads": 2}
    assert bench.turns.best_rates([low, high, {"failed": "why"}]) == best
    assert bench.turns.best_rates([{"failed": "why"}]) is None


# --- what runs report


def test_the_first_two_steps_are_not_counted(bench):
    steps = [step(100.0, 1), step(100.0, 1), step(2.0, 30, head_s=0.5), step(4.0, 50, head_s=1.5)]
    row = bench.report.summarise({"side": "lit_opd", "round": 1, "steps": steps, "peak_mb": 7.0})
    assert (row["steps"], row["step_s"], row["head_s"], row["peak_mb"]) == (2, 3.0, 1.0, 7.0)
    assert row["other_s"] == pytest.approx(2.0)  # medians of 1.5 and 2.5
    assert (row["tokens_per_s"], row["completions_per_s"]) == (13.75, 1.5)  # medians of 15 and 12.5, 2 and 1
    assert row["length"] == 10.0


def test_ratios_pair_the_runs_of_a_round_and_a_failure_leaves_its_pair_out(bench):
    rows = [
        {"side": "a", "round": 1, "step_s": 2.0}, {"side": "b", "round": 1, "step_s": 8.0},
        {"side": "a", "round": 2, "step_s": 3.0}, {"side": "b", "round": 2, "failed": "out of memory"},
        {"side": "b", "round": 3, "step_s": 5.0}, {"side": "a", "round": 3, "step_s": 10.0},
        {"side": "c", "round": 3, "step_s": 1.0}, {"side": "a", "round": 4, "step_s": 2.0},
    ]  # fmt: skip
    ratios = bench.report.pair_ratios(rows, "b", "a", "step_s")
    assert ratios == [4.0, None, 0.5]
    assert bench.report.describe_ratios(ratios) == "2.25 (pair by pair: 4.00, failed, 0.50)"
    assert bench.report.describe_ratios([None]) == "no pair came to an end"


def test_a_table_shows_numbers_and_why_a_run_has_none(bench):
    rows = [
        {"side": "a", "round": 1, "step_s": 2.345, "peak_mb": 99.6},
        {"side": "b", "round": 1, "failed": "ValueError: a|b\n not here"},
    ]
    columns = {"step_s": ("s / step", ".2f"), "head_s": ("head", ".2f"), "peak_mb": ("MB", ".0f")}
    assert bench.report.table(rows, ["side", "round"], columns).splitlines() == [
        "| side | round | s / step | MB |",
        "| --- | --- | --- | --- |",
        "| a | 1 | 2.35 | 100 |",
        "| b | 1 | failed: ValueError: a\\|b not here |  |",
    ]


def test_a_table_of_failures_alone_still_shows_them(bench):
    text = bench.report.table([{"side": "a", "failed": "why"}], ["side"], {"step_s": ("s", ".2f")})
    assert "failed: why" in text


def test_the_text_of_a_workload_holds_failures_ratios_and_the_limit(bench):
    def row(side, number, seconds):
        run = {"side": side, "round": number, "steps": [step(seconds, 16)] * 3, "peak_mb": 10.0, "imports_mb": 1.0}
        return bench.report.summarise(run) | {"over_limit": seconds, "limit": {"rollout_s": 1.0, "step_s": 1.0}}

    rows = [row("lit_opd", 1, 2.0), row("TRL fixed", 1, 6.0), row("lit_opd", 2, 2.0)]
    rows.append({"side": "TRL fixed", "round": 2, "failed": "killed by SIGKILL"})
    rates = {"bf16": {"body": 2e9}, "fp32": {"body": 1e9}, "read": 3e9, "copy": 4e9}
    machine = bench.report.machine()
    results = {"what": "w1", "machine": machine, "rates": rates, "rows": rows, "least_mb": 5.0}
    text = bench.turns.to_text(results)
    assert "- time, TRL fixed / lit_opd: 3.00 (pair by pair: 3.00, failed)" in text
    assert text.count("failed: killed by SIGKILL") == 2  # in the medians' table and in that of all runs
    assert "Limit: 1.00 s (rollout 1.00); least memory 5 MB." in text
    assert "- bf16, GFLOP/s: body 2" in text
    assert machine["cpu"] in text
    json.dumps(results)


def test_the_sides_run_in_turn_and_other_ways_to_start_trl_in_the_end(bench):
    ours, fixed, others = bench.turns.OURS, bench.turns.FIXED, [bench.turns.SHIPPED, bench.turns.SETTLED]
    in_turn = [(ours, 1), (fixed, 1), (ours, 2), (fixed, 2)]
    assert bench.turns.schedule(2, True) == in_turn + [(side, 1) for side in others]
    assert bench.turns.schedule(2, False) == [(ours, 1), (ours, 2)]


def test_without_trl_a_line_says_so(bench, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not bench.turns.has_trl()
    assert capsys.readouterr().out == "TRL is not installed (pip install trl==1.16.0): ours runs alone\n"


def test_results_are_written_as_json_and_markdown(bench, tmp_path):
    bench.report.Options("w1", 3, 1, tmp_path).write({"rows": [1]}, "# W1\n")
    assert json.loads((tmp_path / "benchmark_w1.json").read_text()) == {"rows": [1]}
    assert (tmp_path / "benchmark_w1.md").read_text() == "# W1\n"


def test_too_few_steps_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.cli.main(["w1", "--steps", "2"])
    assert "--steps: expected more than 2, which are not counted, found 2" in capsys.readouterr().err


# --- processes and phases


def test_a_process_that_fails_gives_a_row_that_says_why(bench, capfd):
    found = bench.processes.run("tools.benchmark.nowhere", {})
    assert found["failed"].endswith("No module named tools.benchmark.nowhere")
    assert "No module named" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "errors", "why"),
    [(-9, "", "killed by SIGKILL"), (1, "Traceback\nValueError: no\n", "ValueError: no"), (3, "", "exit code 3")],
)
def test_the_reason_of_a_failure_is_one_line(bench, code, errors, why):
    assert bench.processes.why_failed(code, errors) == why


def test_the_peak_is_that_since_it_was_reset(bench):
    """In a process of its own: one that has run other tests has freed memory to take from."""
    code = """if True:
        import mmap
        from tools.benchmark.processes import peak_mb, reset_peak, resident_mb

        def held(megabytes):
            pages = mmap.mmap(-1, megabytes * 10**6)
            for start in range(0, len(pages), mmap.PAGESIZE):
                pages[start] = 1
            return pages

        held(100).close()
        reset_peak()
        before = peak_mb()
        pages = held(40)
        print(peak_mb() - before, resident_mb() - peak_mb())
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    grown, apart = map(float, done.stdout.split())
    assert grown == pytest.approx(40, abs=2)
    assert apart == pytest.approx(0, abs=2)


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only Linux with glibc has these settings")


@glibc
def test_glibc_understands_the_settings_of_its_allocator(bench):
    """Its loader lists the tunables with their values."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    loader = next(line.split()[-1] for line in maps if "/ld-linux" in line)
    settings = bench.processes.ALLOCATOR
    done = subprocess.run([loader, "--list-tunables"], env=settings, capture_output=True, text=True, check=True)
    values = dict(line.split(":", 1) for line in done.stdout.splitlines())
    for setting in settings["GLIBC_TUNABLES"].split(":"):
        name, value = setting.split("=")
        assert int(values[name].split()[0], 0) == int(value)


def test_processes_have_the_settings_unless_the_user_chose(bench, monkeypatch):
    seen = []
    done = types.SimpleNamespace(returncode=0, stdout="{}")
    monkeypatch.setattr(bench.processes.subprocess, "run", lambda *_, env, **__: seen.append(env) or done)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for settled in (True, False):
        bench.processes.run("module", {}, settled)
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    bench.processes.run("module", {})
    assert [env.get("GLIBC_TUNABLES") for env in seen] == [bench.processes.ALLOCATOR["GLIBC_TUNABLES"], None, ""]


@glibc
@pytest.mark.slow
def test_the_working_memory_of_the_head_does_not_grow_with_its_positions(bench, warm_python, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(warm_python))
    job = {"implementation": "ours", "vocabulary": 65536, "width": 16, "teacher_width": 16, "runs": 1}
    # Under glibc's own settings: under those of the benchmark small blocks do not fragment the heap, whose size then
    # differs by 50 MiB from run to run.
    few, many = (bench.processes.run("tools.benchmark.head", job | {"positions": n}, False) for n in (512, 1536))
    # A thousand positions more. Where small values stay behind every block, they cost 400 MiB.
    assert many["working_mib"] < few["working_mib"] + 96


def test_a_phase_within_a_phase_counts_for_itself_alone(bench, monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0, 20.0, 21.0])  # outer from 0 to 10 and 20 to 21, inner from 1 to 4
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    phases, owner = bench.phases.Phases(), types.SimpleNamespace()
    owner.inner = lambda: "inner"
    owner.outer = lambda calls: owner.inner() if calls else None
    phases.wrap(owner, "inner", "head_s")
    phases.wrap(owner, "outer", "student_s")
    assert owner.outer(True) == "inner"
    owner.outer(False)
    assert phases.take() == {"student_s": 8.0, "head_s": 3.0}
    assert phases.take() == {}


# --- the heads


def test_all_heads_have_one_loss_and_one_gradient(bench):
    inputs = bench.head.make_inputs(16, 64, 24, 40)
    inputs = inputs._replace(teacher_hidden_NG=inputs[2].float(), teacher_weight_VG=inputs[3].float())
    student, teacher = ((h.double() @ w.double().T).log_softmax(-1) for h, w in (inputs[:2], inputs[2:]))
    expected = torch.nn.functional.kl_div(teacher, student, log_target=True, reduction="none").sum(-1).mean()
    wanted = torch.autograd.grad(expected, inputs[:2])
    for name, compute in bench.head.IMPLEMENTATIONS.items():
        if name == "trl":
            pytest.importorskip("trl", reason="TRL's kernel is compared with only where TRL is installed")
        loss = compute(inputs)
        torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-4, msg=name)
        for found, gradient in zip(torch.autograd.grad(loss, inputs[:2]), wanted, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["ours", "dense", "trl"])
def test_a_case_of_the_heads_is_measured_in_the_precision_of_its_side(bench, implementation):
    if implementation == "trl":
        pytest.importorskip("trl", reason="TRL's kernel is measured only where TRL is installed")
    case = {"positions": 16, "vocabulary": 64, "width": 24, "teacher_width": 40, "runs": 1}
    found = bench.head.measure(case | {"implementation": implementation})
    exact = bench.head.measure(case | {"implementation": "dense"})["loss"]
    assert found["seconds"] > 0
    assert found["loss"] == pytest.approx(exact, rel=1e-2)
    assert (abs(found["loss"] / exact - 1) > 1e-6) == (implementation != "dense")  # in fp32 all agree to less


def test_a_case_that_cannot_fit_is_told_and_not_run(bench, monkeypatch):
    monkeypatch.setattr(bench.head_cases, "run", lambda module, job: {"ran": job["implementation"]})
    large = {"positions": 8192, "vocabulary": 151936}
    why = "not run: it would take about 23 GiB, more than 20"
    assert bench.head_cases.run_case(large | {"implementation": "dense"}) == {"failed": why}
    assert bench.head_cases.run_case(large | {"implementation": "ours"}) == {"ran": "ours"}
    small = {"positions": 512, "vocabulary": 151936, "implementation": "dense"}
    assert bench.head_cases.run_case(small) == {"ran": "dense"}


def test_the_text_of_the_heads_compares_every_size(bench):
    def row(side, positions, **found):
        return {"side": side, "round": 1, "V": 64, "N": positions, **found}

    rows = [row(side, 16, seconds=s, working_mib=1.0, loss=2.0) for side, s in (("ours", 1.0), ("dense", 3.0))]
    rows += [row("ours", 32, seconds=1.0, working_mib=1.0, loss=2.0), row("dense", 32, failed="not run")]
    text = bench.head_cases.to_text({"what": "w3", "machine": bench.report.machine(), "rows": rows})
    assert "- V=64, N=16: time, dense / ours: 3.00 (pair by pair: 3.00)" in text
    assert "- V=64, N=32: time, dense / ours: no pair came to an end" in text
    assert "| 64 | 32 | dense | 1 | failed: not run |" in text
    assert "N is the number of positions, V the size of the vocabulary. Only the head is timed" in text


def test_the_published_text_of_the_heads_is_that_of_its_numbers(bench):
    results = json.loads((ROOT / "docs/benchmark_w3.json").read_text())
    assert (ROOT / "docs/benchmark_w3.md").read_text() == bench.head_cases.to_text(results)


# --- growth


def test_the_slope_is_that_of_the_logarithms(bench):
    x, y = [1.0, 2.0, 4.0, 9.0], [3.0, 5.0, 13.0, 20.0]
    assert bench.growth.slope(x, y) == pytest.approx(np.polyfit(np.log(x), np.log(y), 1)[0])


def test_the_medians_of_runs_are_what_growth_draws(bench):
    runs = [
        {"side": "fixed 32", "round": number, "steps": [step(float(number), 256)] * 3, "peak_mb": 10.0 * number}
        for number in (1, 2, 4)
    ]
    rows = bench.report.by_side([bench.report.summarise(run) for run in runs])
    assert bench.growth.curves(rows) == {"fixed": {"tokens": [256], "step_s": [2], "peak_mb": [20]}}


def test_growth_is_drawn_without_the_runs_that_failed(bench, tmp_path):
    rows = [{"side": f"default {n}", "tokens": 8 * n, "step_s": 0.1 * n, "peak_mb": 100.0 + n} for n in (32, 64, 128)]
    rows += [{"side": "fixed 32", "failed": "why"}]
    assert bench.growth.curves(rows) == {
        "default": {"tokens": [256, 512, 1024], "step_s": pytest.approx([3.2, 6.4, 12.8]), "peak_mb": [132, 164, 228]}
    }
    bench.growth.draw(rows, 64, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_growth_doubles_the_tokens_three_times(bench):
    tokens = [w.rows * w.max_new_tokens for name, w in bench.growth.workloads().items() if name.startswith("fixed")]
    assert [b / a for a, b in zip(tokens, tokens[1:], strict=False)] == [2.0, 2.0, 2.0]


# --- both sides on a tiny pair


@pytest.fixture(scope="module")
def tiny_job(bench, llama, make_tiny_tokenizer, tmp_path_factory):
    tokenizer = make_tiny_tokenizer("0123456789+-=?. WhatisCluernv:")
    tokenizer.chat_template = CHAT
    folder = tmp_path_factory.mktemp("pair")
    for name in ("student", "teacher"):
        llama.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    job = bench.workloads.make_job(bench.workloads.Workload(2, 2, 3, 3), steps=3)
    return job | {"student": str(folder / "student"), "teacher": str(folder / "teacher")}


@pytest.mark.parametrize("side", ["ours", "trl"])
@pytest.mark.slow
def test_a_side_reports_every_phase_of_the_same_work(bench, tiny_job, side, warm_python, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(warm_python))
    if side == "trl":
        pytest.importorskip("trl", reason="TRL's side runs only where TRL is installed")
    run = bench.processes.run(f"tools.benchmark.{side}", tiny_job | {"fixed": True})
    assert "failed" not in run
    assert len(run["steps"]) == 3
    for one in run["steps"]:
        assert (one["tokens"], one["completions"]) == (12, 4)
        assert all(one[name] > 0 for name in bench.phases.SPLIT)
        assert sum(one[name] for name in bench.phases.SPLIT) < one["step_s"]
    # The teacher is the student in bf16.
    assert run["steps"][0]["reverse_kl"] == pytest.approx(0.0, abs=1e-3)
    assert 0 < run["imports_mb"] < run["peak_mb"]


def test_other_prompts_than_those_of_the_job_stop_the_run(bench):
    recorder = bench.ours.Recorder([["1+1="]])
    config = types.SimpleNamespace(prompt_column="prompt")
    trainer = types.SimpleNamespace(datamodule=types.SimpleNamespace(config=config))
    batch = types.SimpleNamespace(rows=[{"prompt": "2+2="}])
    with pytest.raises(RuntimeError, match="step 0 saw other prompts than the other side does"):
        recorder.on_train_batch_end(trainer, None, None, batch, 0)


def test_the_batches_of_a_second_epoch_follow_those_of_the_first(bench):
    recorder = bench.ours.Recorder([["1+1="], ["2+2="]])
    metrics = {f"perf/{name}": 1.0 for name in ("rollout_s", "teacher_s", "student_s")}
    trainer = types.SimpleNamespace(
        datamodule=types.SimpleNamespace(config=types.SimpleNamespace(prompt_column="prompt")),
        callback_metrics=metrics | {"rollout/length": 1.0, "train/reverse_kl": 0.0},
    )
    module = types.SimpleNamespace(rollout_config=types.SimpleNamespace(num_completions=1))
    for prompt in ("1+1=", "2+2="):  # Lightning counts from 0 again in every epoch
        batch = types.SimpleNamespace(rows=[{"prompt": prompt}])
        recorder.on_train_batch_end(trainer, module, None, batch, batch_idx=0)
    assert len(recorder.steps) == 2


def test_the_batches_of_a_job_hold_its_questions_each_once_an_epoch(bench):
    job = bench.workloads.make_job(bench.workloads.WORKLOADS["w1"], steps=9)
    first = [question for batch in job["batches"][:8] for question in batch]
    assert sorted(first) == sorted(job["questions"])
    assert first != job["questions"]
    assert [len(batch) for batch in job["batches"]] == [8] * 9
