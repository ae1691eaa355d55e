# SPDX-License-Identifier: Apache-2.0
"""`avar data check`: a clean file passes, and every check finds its row; exit codes, report, and what trainers do."""

import base64
import copy
import io
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from rich.console import Console

from avar_verl.data.check import CHECKS, RowChecker, Settings, check_files
from avar_verl.tools import cli
from avar_verl.tools.demo import photo_grid

BOX = [[56.0, 0.0, 112.0, 56.0]]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """{"sft": rows, "rl": rows}: photo grids, with boxes and a system turn."""
    folder = tmp_path_factory.mktemp("clean")
    photo_grid.make_sft_parquet(folder / "sft.parquet", 4, 0)
    photo_grid.make_rl_parquet(folder / "rl.parquet", 4, 0)
    rows = {kind: pyarrow.parquet.read_table(folder / f"{kind}.parquet").to_pylist() for kind in ("sft", "rl")}
    for row in rows["sft"]:
        row["messages"].insert(0, {"role": "system", "content": "Look twice."})
        row["boxes"] = [BOX]
    for row in rows["rl"]:
        row["prompt"].insert(0, {"role": "system", "content": "Look twice."})
        row["extra_info"] |= {"boxes": BOX, "boxes_size": [112, 112]}
    text = copy.deepcopy(rows["sft"][3])
    text["messages"][1]["content"] = text["messages"][1]["content"].replace("<image>", "")
    rows["sft"][3] = {**text, "images": [], "boxes": []}
    return rows


def png(size, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return {"bytes": buffer.getvalue()}


def turns(*content, system=True):
    roles = ["system", "user", "assistant", "user", "assistant"]
    return [{"role": role, "content": text} for role, text in zip(roles[not system :], content, strict=False)]


def change(row, path, value):
    """A copy of the row with another value at a path of keys; DELETE takes the key away."""
    row = copy.deepcopy(row)
    target = row
    for key in path[:-1]:
        target = target[key]
    if value is DELETE:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return row


DELETE = object()
FORMS = [
    # kind, path, value, check, message
    ("sft", ["messages"], None, "messages", "`messages` must be a list of turns; got None."),
    ("sft", ["messages"], [], "messages", "`messages` must be a list of turns; got []."),
    ("rl", ["prompt"], "What?", "messages", "`prompt` must be a list of turns; got 'What?'."),
    ("sft", ["messages", 1], {"from": "human", "value": "a"}, "messages",
     "a turn must have role and content; got {'from': 'human', 'value': 'a'} as turn 1."),
    ("sft", ["messages", 1, "role"], "human", "roles",
     "user must come after system; got ['system', 'human', 'assistant']."),
    ("sft", ["messages", 0, "role"], "assistant", "roles",
     "system or user must come first; got ['assistant', 'user', 'assistant']."),
    ("sft", ["messages", 2, "role"], "system", "roles",
     "assistant must come after user; got ['system', 'user', 'system']."),
    ("sft", ["messages", 2], DELETE, "roles", "the last turn of sft must be the assistant's; got ['system', 'user']."),
    ("rl", ["prompt"], turns("a", "<image>b", "c"), "roles",
     "the last turn of rl must be the user's; got ['system', 'user', 'assistant']."),
    ("sft", ["messages", 2, "content"], None, "content", "turn 2: content must be text or a list of blocks; got None."),
    ("sft", ["messages", 1, "content"], [{"type": "picture"}], "content",
     "turn 1: a block must have the type text, image or video; got {'type': 'picture'}."),
    ("sft", ["messages", 1, "content"], [{"type": "text"}], "content",
     "turn 1: a text block must hold text; got {'type': 'text'}."),
    ("sft", ["messages", 2, "content"], " \n", "empty_turn",
     "a response must say something; got ' \\n' as turn 2."),
    ("rl", ["prompt"], turns("a", ""), "empty_turn", "a user turn must say something; got '' as turn 1."),
    ("sft", ["messages", 2, "tool_calls"], [{"function": {}}], "tool_calls",
     "a turn must have a role and content and nothing else; got ['tool_calls']."),
    ("sft", ["messages", 1, "name"], "me", "tool_calls",
     "a turn must have a role and content and nothing else; got ['name']."),
    ("sft", ["messages", 1, "name"], "", "tool_calls",
     "a turn must have a role and content and nothing else; got ['name']."),
    ("sft", ["messages", 2, "loss_mask"], 2, "flags",
     "a turn's loss_mask and trainable must be 0 or 1; got {'loss_mask': 2}."),
    ("sft", ["messages", 1, "trainable"], True, "flags",
     "only assistant turns are trained on; got {'trainable': True} in a user turn."),
    ("sft", ["messages", 2, "loss_mask"], 0, "flags",
     "a row must have a turn that is trained on; got none of ['system', 'user', 'assistant']."),
    ("sft", ["messages", 1, "content"], "What?", "markers",
     "<image> must occur once for each of `images`; got 0 for 1."),
    ("rl", ["prompt", 1, "content"], "<image><image>What?", "markers",
     "<image> must occur once for each of `images`; got 2 for 1."),
    ("rl", ["images"], None, "markers", "<image> must occur once for each of `images`; got 1 for 0."),
    ("sft", ["messages", 1, "content"], "<image><video>What?", "markers",
     "<video> must occur once for each of `videos`; got 1 for 0."),
    ("sft", ["videos"], ["a.mp4"], "video", "got 1 videos."),
    ("rl", ["videos"], ["a.mp4"], "video", "got 1 videos."),
    ("sft", ["messages"], turns("a", "What?", "See <image>."), "marker_in_response",
     "a response must be text; got <image> in it."),
    ("sft", ["images"], {"bytes": b"a"}, "image_layout", "`images` must be a list; got {'bytes': b'a'}."),
    ("rl", ["prompt", 1, "content"], [{"type": "image"}, {"type": "text", "text": "a"}], "image_layout",
     "in RL a block must hold its image as a path; got {'type': 'image'}."),
    ("rl", ["prompt", 1, "content"], [{"type": "text", "text": "a", "image": None}], "null_block",
     "a text block with a key of images counts as an image; got ['image']."),
    ("sft", ["images", 0], {"bytes": b"no image"}, "image",
     "image 0: an image must be in a format that Pillow reads; got 8 bytes that start with b'no image'"),
    ("sft", ["images", 0], {"image": "/nowhere.png"}, "image",
     "image 0: an image file must exist; got '/nowhere.png'"),
    ("rl", ["images", 0], {"image": "https://example.org/a.png"}, "image",
     "image 0: images must be on this machine; got the URL 'https://example.org/a.png'"),
    ("rl", ["images", 0], {"image": base64.b64encode(png((112, 112))["bytes"]).decode()}, "image",
     "image 0: an image must be the bytes of a file, a path or a data URI; got 156 characters that look like base64 of "
     "a PNG file ('iVBORw0KGgoAAAANSUhEUgAA'). Put 'data:image/png;base64,' before it"),
    ("sft", ["images", 0], png((402, 2)), "image_ratio",
     "a side may be 200 times the other; got (402, 2) of image 0."),
    ("sft", ["images", 0], png((112, 27)), "image_small",
     "a side has fewer than the 28 pixels of a token; got (112, 27) of image 0."),
    ("sft", ["images", 0], png((112, 112), "RGBA"), "image_pixels",
     "image 0 has transparent pixels, which become white."),
    ("sft", ["boxes"], None, "boxes", "boxes must be one list for every image; got None."),
    ("sft", ["boxes"], [BOX, BOX], "boxes", "boxes must be one list for every image; got 2 for 1 images."),
    ("sft", ["boxes"], BOX, "boxes", "a box must be four numbers (x1, y1, x2, y2); got 56.0."),
    ("sft", ["boxes"], [[[1, 2, 3]]], "boxes", "a box must be four numbers (x1, y1, x2, y2); got [1, 2, 3]."),
    ("sft", ["boxes"], [[[0, 0, 113, 56]]], "boxes",
     "a box must have positive area inside the image; got [0, 0, 113, 56] in 112 x 112."),
    ("sft", ["boxes"], [[[9, 0, 9, 56]]], "boxes",
     "a box must have positive area inside the image; got [9, 0, 9, 56] in 112 x 112."),
    ("sft", ["boxes"], [[[float("nan"), 0, 9, 56]]], "boxes",
     "a box must have positive area inside the image; got [nan, 0, 9, 56] in 112 x 112."),
    ("rl", ["extra_info", "boxes"], [[0, 0, 200, 9]], "boxes",
     "a box must have positive area inside the image; got [0, 0, 200, 9] in 112 x 112."),
    ("rl", ["extra_info", "boxes_size"], None, "boxes",
     "extra_info['boxes'] must be of the one image of a row, and extra_info['boxes_size'] its (width, height); got 1 "
     "images and None."),
    ("rl", ["extra_info", "boxes_size"], ["a", "b"], "boxes", "extra_info['boxes'] must be of the one image of a row"),
    ("rl", ["data_source"], DELETE, "data_source", "`data_source` must be text; got None."),
    ("rl", ["data_source"], "", "data_source", "`data_source` must be text; got ''."),
    ("rl", ["reward_model"], DELETE, "ground_truth", "`reward_model` must have a ground_truth; got None."),
    ("rl", ["reward_model", "ground_truth"], " ", "ground_truth",
     "`reward_model` must have a ground_truth; got {'style': 'rule', 'ground_truth': ' '}."),
    ("rl", ["reward_model", "ground_truth"], float("nan"), "ground_truth",
     "`reward_model` must have a ground_truth; got {'style': 'rule', 'ground_truth': nan}."),
    ("rl", ["reward_model", "ground_truth"], True, "ground_truth",
     "ground_truth must be a str, a number or a list of these; got bool for this row."),
    ("rl", ["reward_model", "ground_truth"], {"answer": "cat"}, "ground_truth",
     "ground_truth must be a str, a number or a list of these; got dict for this row."),
    ("rl", ["reward_model", "ground_truth"], [["cat"]], "ground_truth",
     "ground_truth must be a str, a number or a list of these; got list for this row."),
    ("rl", ["reward_model", "ground_truth"],
     "Answer: the work would take 180 days.\nTherefore, the answer is: 180.", "ground_truth",
     "ground_truth must be the final answer alone, as text; got 'Answer: the work"),
    ("rl", ["reward_model", "ground_truth"], "#### 72", "ground_truth",
     "ground_truth must be the final answer alone, as text; got '#### 72' for this row."),
    ("rl", ["reward_model", "ground_truth"], "a" * 201, "ground_truth_long",
     "more than 200 characters are compared as text only."),
    ("rl", ["extra_info", "options"], ["dog", "bird"], "ground_truth",
     "ground_truth must be the letter of one of 2 options"),
    ("rl", ["extra_info", "options"], "dog, bird", "ground_truth",
     "extra_info['options'] must be a list of at most 10 texts"),
    ("rl", ["extra_info"], "none", "extra_info", "`extra_info` must be a struct; got 'none'."),
    ("sft", ["messages"], turns("<image>What?", "This.", system=False), "no_system", "there is no system turn."),
    ("sft", ["messages", 2, "content"], "a <|im_end|> b", "special_token_like",
     "text spells '<|im_end|>' in a assistant turn."),
]  # fmt: skip


@pytest.mark.parametrize("kind, path, value, check, message", FORMS)
def test_every_check_finds_its_row(clean, kind, path, value, check, message):
    found = RowChecker(Settings())(change(clean[kind][0], path, value), kind).findings
    assert [text for name, text in found if name == check and text.startswith(message)], found


def test_layouts_that_one_data_set_opens_and_the_other_does_not(clean, tmp_path):
    data = clean["sft"][0]["images"][0]["bytes"]
    (tmp_path / "a.png").write_bytes(data)
    checker = RowChecker(Settings())
    with_path = {"bytes": None, "path": str(tmp_path / "a.png")}
    for kind in ("sft", "rl"):
        (found,) = checker(change(clean[kind][0], ["images", 0], with_path), kind).findings
        assert found == ("image_layout_verl", "image 0 is a dict whose `bytes` is null.")
    assert checker(change(clean["rl"][0], ["images", 0], str(tmp_path / "a.png")), "rl").findings == []


def test_what_is_right_is_not_found(clean):
    checker = RowChecker(Settings())
    for kind, rows in clean.items():
        assert [checker(row, kind).findings for row in rows] == [[]] * 4
    row = clean["rl"][0]
    for truth in (0, "0", ["a"], 2.5, "\\frac{1}{2}", "A, C"):
        assert checker(change(row, ["reward_model", "ground_truth"], truth), "rl").findings == []
    for truth in (False, {"a": 1}, "#### 72"):  # For a reward of another kind.
        assert checker(change(row, ["reward_model"], {"style": "mine", "ground_truth": truth}), "rl").findings == []
    sft = change(clean["sft"][0], ["messages", 0, "content"], "")  # Keeps a template from writing its own.
    assert checker(sft, "sft").findings == []
    blocks = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    assert checker(change(sft, ["messages", 1, "content"], blocks), "sft").findings == []
    calls = [{"function": {"name": "look", "arguments": "{}"}}]
    tools = [*turns("Use tools.", "<image>What?", ""), {"role": "tool", "content": ""}, *turns("A", "B")[1:]]
    tools[2]["tool_calls"] = calls
    tools.insert(4, {"role": "assistant", "content": "A cat."})
    assert checker(change(row, ["prompt"], tools), "rl").findings == []
    text = change(change(row, ["prompt", 1, "content"], "What?"), ["images"], [])
    assert checker(change(text, ["extra_info", "boxes"], []), "rl").findings == []
    two = change(change(sft, ["messages", 1, "content"], "<image>and<image>?"), ["images"], sft["images"] * 2)
    assert checker(change(two, ["boxes"], [BOX, []]), "sft").findings == []


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(monkeypatch, *arguments):
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["avar", "data", "check", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_command(clean, tmp_path, monkeypatch, capsys):
    files = [write(tmp_path / f"{kind}.parquet", rows) for kind, rows in clean.items()]
    assert run(monkeypatch, *files) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 sft, 4 rl rows: 7 with images, 1 text only; images a row min 0, median 1, max 1" in shown
    assert "0 errors, 0 warnings" in shown

    rows = [change(clean["sft"][0], ["messages"], turns("<image>What?", f"{n}", system=False)) for n in range(3)]
    assert run(monkeypatch, write(tmp_path / "warn.parquet", rows)) == 0  # Warnings do not fail.
    assert "0 errors, 3 warnings" in capsys.readouterr().out

    bad = [clean["sft"][0], change(clean["sft"][1], ["images", 0], {"bytes": b"no image"}), clean["sft"][0]]
    bad = write(tmp_path / "bad.parquet", bad)
    assert run(monkeypatch, bad, "--out", tmp_path / "report.json") == 1
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "an image must be in a format that Pillow reads" in shown and "1 errors, 1 warnings" in shown
    assert CHECKS["image"].fix.split()[0] in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == {"sft": 3} and report["errors"] == 1 and report["warnings"] == 1
    image, duplicate = report["findings"]
    assert (image["row"], image["check"], image["level"]) == (1, "image", "error") and image["fix"]
    assert (duplicate["row"], duplicate["check"]) == (2, "duplicate")
    assert duplicate["message"] == f"the same turns and images as row 0 of {bad}."
    assert run(monkeypatch, bad, "--n", "1") == 0

    assert "only one" not in capsys.readouterr().out
    assert (
        run(monkeypatch, tmp_path / "none.parquet")
        == f"avar data check: a data file must exist; got {tmp_path}/none.parquet. Check the path."
    )  # noqa: E501
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, bad, "--max-length", "9") == 2
    assert "max_length counts a processor's tokens" in capsys.readouterr().err
    assert "a model must be a Hugging Face folder or a name on the hub; got '/nowhere'" in run(
        monkeypatch, bad, "--model", "/nowhere"
    )


def test_files_that_cannot_be_read_are_findings(clean, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"half of a file")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns("a", "b", "c")}) + "\n{broken\n")
    write(tmp_path / "c.jsonl", [{"question": "What?"}])
    good = write(tmp_path / "d.parquet", clean["rl"])
    report = check_files([tmp_path / "a.parquet", tmp_path / "b.jsonl", tmp_path / "c.jsonl", good], Settings())
    assert report.rows == {"sft": 1, "rl": 4}
    found = {(finding.file.rsplit("/")[-1], finding.check): finding for finding in report.findings}
    assert set(found) == {("a.parquet", "file"), ("b.jsonl", "file"), ("c.jsonl", "columns")}
    assert all(finding.row is None for finding in found.values())
    assert "line 2 of " in found["b.jsonl", "file"].message
    assert found["c.jsonl", "columns"].message == (
        "a row must have one of the columns ['messages', 'prompt']; got ['question']."
    )
    console = Console(file=io.StringIO(), width=120)
    report.print(console)
    assert "a.parquet" in console.file.getvalue()


def test_every_check_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert [name for name in CHECKS if f"`{name}`" not in text] == []


def test_brackets_in_messages_are_shown_as_they_are(clean, tmp_path):
    row = change(clean["sft"][0], ["boxes"], [[[9.0, 0.0, 9.0, 56.0]]])
    report = check_files(write(tmp_path / "rows.parquet", [row]), Settings())
    console = Console(file=io.StringIO(), width=200)
    report.print(console)
    assert "got [9.0, 0.0, 9.0, 56.0] in 112 x 112" in console.file.getvalue()


def test_a_byte_order_mark_opens_a_file_and_no_line(clean, tmp_path):
    rows = [{"messages": turns("a", "b", "c")}] * 2
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    texts = {"a.jsonl": lines, "b.json": json.dumps(rows), "c.jsonl": "\n\ufeff".join(lines.splitlines())}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    for name in ("a.jsonl", "b.json"):
        report = check_files(tmp_path / name, Settings())
        assert report.rows == {"sft": 2} and report.count("error") == 0
    (error,) = [one for one in check_files(tmp_path / "c.jsonl", Settings()).findings if one.level == "error"]
    assert error.check == "file" and "line 2 of " in error.message and "BOM" in error.message


def test_kinds(clean, tmp_path):
    both = [{**clean["rl"][0], "messages": clean["sft"][0]["messages"]}]
    assert check_files(write(tmp_path / "both.parquet", both), Settings()).rows == {"rl": 1}
    assert check_files(tmp_path / "both.parquet", Settings(kind="sft")).rows == {"sft": 1}
    report = check_files(write(tmp_path / "rl.parquet", clean["rl"]), Settings(kind="sft"))
    assert {finding.check for finding in report.findings} == {"messages"} and report.count("error") == 4


def test_processes_find_the_same_in_the_same_order(clean, tmp_path):
    rows = [change(clean["rl"][0], ["prompt", 1, "content"], f"<image>{n}" if n % 7 else f"{n}") for n in range(40)]
    path = write(tmp_path / "rows.parquet", rows)
    one, two = (check_files(path, Settings(), processes=processes) for processes in (1, 2))
    assert one == two and [finding.row for finding in one.findings] == [0, 7, 14, 21, 28, 35]
    assert check_files(path, Settings(), n=8).rows == {"rl": 8}


@pytest.mark.parametrize("settings, message", [
    ({"kind": "dpo"}, r"kind must be one of \['sft', 'rl', 'auto'\]; got 'dpo'"),
    ({"max_length": 9}, "max_length counts a processor's tokens of sft rows; got 9 with model=None and kind='auto'"),
    ({"max_prompt_length": 9, "kind": "sft", "model": "m"}, "max_prompt_length counts .* of rl rows; got 9 with model"),
])  # fmt: skip
def test_settings_that_would_do_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_no_process_is_refused(clean, tmp_path):
    with pytest.raises(ValueError, match="processes must be at least 1; got 0"):
        check_files(write(tmp_path / "a.parquet", clean["rl"]), Settings(), processes=0)


def test_every_family_s_delimiters_are_looked_for():
    """Without a model; `</s>` and `[INST]`, which ordinary text may have, only with one."""
    from avar_verl.data.check import SPECIAL
    from avar_verl.model.families import FAMILIES, get_family
    from avar_verl.model.turns import TurnFormat

    for name in FAMILIES:
        turn_format = get_family(name).turns
        if isinstance(turn_format, TurnFormat):
            for token in (*turn_format.ends, *turn_format.tokens):
                assert SPECIAL.fullmatch(token) or not token.startswith("<|"), (name, token)


@pytest.fixture(scope="module")
def checker(tiny_model_path):
    from avar_verl.plugin.datasets.check_rendered import Rendering

    return RowChecker(Settings(model=str(tiny_model_path), max_length=110, max_prompt_length=60), Rendering)


def test_with_a_model_tokens_are_those_of_the_data_set(checker, clean, tiny_model_path, tmp_path):
    from omegaconf import OmegaConf
    from verl.utils.tokenizer import hf_processor

    from avar_verl.plugin.datasets.sft import AvarSFTDataset

    processor = hf_processor(str(tiny_model_path))
    path = write(tmp_path / "sft.parquet", [{k: row[k] for k in ("messages", "images")} for row in clean["sft"]])
    samples = AvarSFTDataset(str(path), processor.tokenizer, OmegaConf.create({"max_length": 512}), processor)
    results = [checker(row, "sft") for row in clean["sft"]]
    assert [result.findings for result in results] == [[]] * 4
    assert [result.num_tokens for result in results] == [len(samples[i]["input_ids"]) for i in range(4)]


@pytest.mark.parametrize("kind, path, value, check, message", [
    ("sft", ["messages", 2, "content"], "cat " * 80, "length", "a row may have max_length=110 tokens; got "),
    ("rl", ["prompt", 1, "content"], "<image>" + "cat " * 40, "length",
     "a row may have max_prompt_length=60 tokens; got "),
    ("sft", ["messages", 1, "content"], "<image>a <|image_pad|>", "special_token",
     "text must not spell '<|image_pad|>'; got it in a user turn."),
    ("sft", ["messages", 2, "content"], "a <|im_end|> b", "special_token",
     "text must not spell '<|im_end|>'; got it in a assistant turn."),
    ("rl", ["images", 0], {**png((112, 112)), "min_pixels": 9**9, "max_pixels": 1}, "render", "AssertionError: "),
])  # fmt: skip
def test_every_check_with_a_model_finds_its_row(checker, clean, kind, path, value, check, message):
    found = checker(change(clean[kind][0], path, value), kind).findings
    assert [text for name, text in found if name == check and text.startswith(message)], found


def test_boxes_in_tokens_and_default_system_turns_are_right(checker, clean):
    row = change(clean["sft"][0], ["messages", 2, "content"], "<|box_start|>(1,2),(3,4)<|box_end|>")
    assert checker(row, "sft").findings == []
    row = change(row, ["messages"], row["messages"][1:])  # The template writes a system turn.
    assert checker(row, "sft").findings == []


def test_templates_and_processors_that_do_not_fit(checker, clean, monkeypatch):
    rendering = checker.rendering
    template = rendering.processor.chat_template
    plain = "{% for m in messages %}{% for c in m['content'] %}{{ '<|vision_start|><|image_pad|><|vision_end|>' if "
    plain += "c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
    for text, found in {
        plain: ["a rendered row must have tokens of the role USER; got none.",
                "a rendered row must have tokens of the role RESPONSE; got none.",
                "the row has no system turn, and the chat template writes none."],
        template.replace("<|vision_start|><|image_pad|>", "<|vision_start|>"):
            ["every image feature must have its placeholder; got 0 for 16."],
        "{{ raise_exception('roles must alternate') }}": ["TemplateError: roles must alternate"],
    }.items():  # fmt: skip
        monkeypatch.setattr(rendering.processor, "chat_template", text)
        row = clean["sft"][0]
        assert [message for _, message in checker(row, "sft").findings] == found
