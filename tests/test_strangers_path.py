"""The path of somebody who has just found the package, as the documents write it, in one folder.

The first station, to install it and to try it, is what `.ci/run` does in a fresh environment.
"""

import json

import pytest
from documents import OF_THE_GATE, PATH, ROOT, blocks_of, name_of, run_document

# In the order of the path: the document, and what stands in one of its blocks that run.
STATIONS = [
    ("README.md", "fit --config conf/quickstart.yaml"),  # try
    ("README.md", "check my_estimators.py:bounded_reverse_kl"),  # an estimator of one's own, checked
    ("README.md", "estimator.name=my_estimators.py:bounded_reverse_kl"),  # and trained with
    ("docs/data.md", "def right(completion, row):"),  # a verifier of one's own
    ("docs/data.md", "path: sums.jsonl"),  # on data of one's own
    ("docs/data.md", "fit --config mine.yaml"),
    ("docs/data.md", "export --config mine.yaml"),  # the model exported
    ("docs/data.md", 'AutoModelForCausalLM.from_pretrained("outputs/exported")'),  # and loaded
    ("tutorials/04_measure_and_compare.md", "top_4: [estimator.name=teacher_topk"),  # a comparison of three
    ("tutorials/04_measure_and_compare.md", "compare --config pairs.yaml"),
    ("tutorials/04_measure_and_compare.md", "outputs/pairs/report/report.md"),  # the report, read
]


def test_every_station_of_the_path_is_written_in_its_order():
    blocks = [(name_of(page), block) for page in PATH for block in blocks_of(page)
              if block.language in ("bash", "python") or "file" in block.settings]  # fmt: skip
    found = [next((i for i, (name, block) in enumerate(blocks) if name == page and words in block.code), None)
             for page, words in STATIONS]  # fmt: skip
    assert None not in found
    assert found == sorted(found)
    assert blocks[found[0]][1].settings["name"] in OF_THE_GATE["README.md"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # three documents, one after the other
def test_the_path_can_be_walked(scratch, warm_python):
    for document in PATH:
        run_document(document, scratch, warm_python)
    own = json.loads((scratch / "outputs" / "own" / "summary.json").read_text())
    assert own["after"] != own["before"]  # README's estimator trains
    folders = (scratch / "outputs" / "exported", ROOT / "lit_opd" / "tiny" / "student")
    exported, shipped = (json.loads((folder / "config.json").read_text())["architectures"] for folder in folders)
    assert exported == shipped
    compared = json.loads((scratch / "compare.json").read_text())
    assert all(label in json.dumps(compared) for label in ("token", "full_vocab", "top_4"))
