# SPDX-License-Identifier: Apache-2.0
"""The page of rollouts: everything is in it, nothing of a rollout's text acts in it, boxes are where they belong."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from avar_verl.data.images import image_file
from avar_verl.data.rows import read_rows
from avar_verl.tools.rollouts.command import Show
from avar_verl.tools.rollouts.show import collect, script_json, write_page

HOSTILE = '</script><script>document.title="owned"</script><!-- <img src=x onerror=alert(1)> \u2028 \x00 \ud800 &lt;'
CHROMIUM = shutil.which("chromium")


def dump(folder, step: int, rows: list[dict], name: str | None = None):
    """Write rollouts, each with what the trainer writes unless `rows` says otherwise."""
    lines = []
    for at, row in enumerate(rows):
        given = {"input": "system\nuser\nWhat?", "output": "a", "gts": "4", "score": 1.0, "step": step}
        lines.append(
            {**given, "uid": f"p_{at}_0", "data_source": "grid", "correct": True, "parts": {}, "visual": {}, **row}
        )
    folder.mkdir(exist_ok=True, parents=True)
    (folder / (name or f"{step}.jsonl")).write_text("\n".join(json.dumps(line) for line in lines) + "\n")


def store(folder, image: Image.Image) -> str:
    name, content = image_file(image)
    (folder / "images").mkdir(exist_ok=True, parents=True)
    (folder / "images" / name).write_bytes(content)
    return f"images/{name}"


def content_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)[1])


def collected(folder, coordinates: str = "auto", side: int = 384) -> dict:
    return collect(read_rows(folder), coordinates, side)


def text_of(rollout: dict) -> str:
    return "".join(piece for piece, *_ in rollout["text"])


def test_the_page_holds_every_rollout_and_each_image_once(tmp_path):
    """Steps 2 and 10 in the order of numbers; three prompts of four rollouts, two of them with the same image."""
    red, blue = (store(tmp_path, Image.new("RGB", (40, 20), color)) for color in ("red", "blue"))
    for step, images in ((10, (red,)), (2, (blue, red))):
        rows = [
            {"output": f"answer {step} {p} {n}", "uid": f"{p}{step}_{n}_0", "images": [image], "parts": {"acc": n % 2}}
            for p, image in enumerate(images) for n in range(4)
        ]  # fmt: skip
        dump(tmp_path, step, rows)
    message = write_page(Show(data=tmp_path))
    assert message == f"12 rollouts of 2 steps, 2 images: {tmp_path / 'rollouts.html'}"
    page = (tmp_path / "rollouts.html").read_text()
    content = content_of(page)
    expected = [f"answer {step} {p} {n}" for step, p in ((2, 0), (2, 1), (10, 0)) for n in range(4)]
    assert [text_of(rollout) for rollout in content["rollouts"]] == expected
    assert [rollout["prompt"] for rollout in content["rollouts"]] == [*[1] * 4, *[2] * 4, *[0] * 4]
    assert [content["prompts"][n]["images"] for n in (0, 1, 2)] == [[[0, 40, 20]], [[1, 40, 20]], [[0, 40, 20]]]
    assert len(content["images"]) == 2 and all(page.count(image) == 1 for image in content["images"])
    assert content["reward"] == ["reward", "advantage", "acc"] and content["visual"] == []
    only = write_page(Show(data=tmp_path, out=tmp_path / "new" / "ten.html", steps=(10,)))
    assert only == f"4 rollouts of 1 steps, 1 images: {tmp_path / 'new' / 'ten.html'}"


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.scripts, self.links = 0, []

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_the_page_needs_nothing_else(tmp_path):
    dump(tmp_path, 1, [{"images": ["https://example.com/a.png"]}])
    write_page(Show(data=tmp_path))
    page = _Page()
    text = (tmp_path / "rollouts.html").read_text()
    page.feed(text)
    assert (
        page.links == []
        and page.scripts == 2
        and "@import" not in text
        and "url(" not in text.replace("url(index)", "")
    )
    assert content_of(text)["prompts"][0]["elsewhere"] == ["https://example.com/a.png"]


def test_hostile_text_stays_text(tmp_path):
    everywhere = {"output": HOSTILE, "input": HOSTILE, "gts": HOSTILE, "data_source": HOSTILE}
    dump(tmp_path, 1, [{**everywhere, "parts": {HOSTILE[:40]: 1.0, "why": HOSTILE}}])
    write_page(Show(data=tmp_path))
    page = _Page()
    text = (tmp_path / "rollouts.html").read_text(encoding="utf-8")
    page.feed(text)
    assert page.scripts == 2 and "<img" not in text and "<!--" not in text
    (rollout,) = content_of(text)["rollouts"]
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert text_of(rollout) == shown and rollout["notes"] == [f"why: {shown}"]
    assert json.loads(script_json({"a": "</script><!--"})) == {"a": "</script><!--"}


def test_boxes_and_points_are_at_the_right_pixels(tmp_path):
    """The image is stored with 40 x 20 pixels; the model saw 80 x 40, and writes in thousandths or pixels of that."""
    image = store(tmp_path, Image.new("RGB", (40, 20), "red"))
    info = {"image_sizes": [[80, 40]], "boxes": [[10, 5, 20, 10]], "boxes_size": [40, 20]}
    texts = [
        "<|box_start|>(250,500),(500,1000)<|box_end|>",
        'In the image: {"bbox_2d": [8, 10, 40, 30], "label": "cup"}',
        'Click {"point_2d": [40, 10], "label": "cup"}',
    ]
    dump(tmp_path, 1, [{"output": text, "images": [image], "extra_info": info} for text in texts])
    content = collected(tmp_path, "absolute")
    assert content["prompts"][0]["images"] == [[0, 80, 40]] and content["prompts"][0]["boxes"] == [[20, 10, 40, 20]]
    assert [rollout["places"] for rollout in content["rollouts"]] == [[], [[8, 10, 40, 30]], [[40, 10]]]
    first = collected(tmp_path)["rollouts"][0]
    assert first["places"] == [[20, 20, 40, 40]]
    second = content["rollouts"][1]["text"]
    assert [(piece, kind, place) for piece, kind, place in second if kind] == [
        ("In the image", "phrase", None),
        ("[8, 10, 40, 30]", "bbox", 0),
    ]


def test_what_has_no_scale_is_marked_and_not_drawn(tmp_path):
    image = store(tmp_path, Image.new("RGB", (80, 40)))
    dump(tmp_path, 1, [{"output": '{"bbox_2d": [8, 10, 40, 30]}', "images": [image]}])
    (rollout,) = collected(tmp_path)["rollouts"]
    assert rollout["places"] == [] and ["[8, 10, 40, 30]", "bbox", None] in [list(piece) for piece in rollout["text"]]


def test_boxes_of_several_images_are_of_none_of_them(tmp_path):
    images = [store(tmp_path, Image.new("RGB", (80, 40), color)) for color in ("red", "blue")]
    dump(tmp_path, 1, [{"output": "<box>(250,500),(500,1000)</box>", "images": images}])
    content = collected(tmp_path)
    assert content["rollouts"][0]["places"] == [] and len(content["prompts"][0]["images"]) == 2


def test_large_images_are_shrunk_and_keep_their_coordinates(tmp_path):
    image = store(tmp_path, Image.new("RGB", (800, 400), "red"))
    dump(tmp_path, 1, [{"output": "<box>(250,500),(500,1000)</box>", "images": [image]}])
    content = collected(tmp_path, side=100)
    with Image.open(io.BytesIO(base64.b64decode(content["images"][0].split(",")[1]))) as shown:
        assert shown.size == (100, 50)
    assert content["prompts"][0]["images"] == [[0, 800, 400]]
    assert content["rollouts"][0]["places"] == [[200, 200, 400, 400]]


def test_numbers_are_numbers_and_the_rest_is_said(tmp_path):
    parts = {"acc": True, "iou": 0.5, "bad": float("nan"), "why": "too long", "list": [1]}
    dump(tmp_path, 1, [{"parts": parts, "visual": {"vas": None, "ratio": float("inf"), "image_share": 0.25}}])
    (rollout,) = collected(tmp_path)["rollouts"]
    assert rollout["reward"] == {"acc": 1.0, "iou": 0.5, "reward": 1.0} and rollout["visual"] == {"image_share": 0.25}
    assert rollout["notes"] == ["why: too long"]


def test_dumps_of_verl_itself(tmp_path):
    """Rollouts: text and score. Validation: parts are columns, and `acc` says what is right."""
    rows = [{"input": "What?", "output": "a", "gts": None, "score": 0.5, "step": 3, "uid": "x_0_0"}]
    rows.append({**rows[0], "acc": 1.0, "reward": 0.5, "uid": "y_0_0"})
    (tmp_path / "3.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = collected(tmp_path)["rollouts"]
    assert first["correct"] is None and first["reward"] == {"reward": 0.5}
    assert second["correct"] is True and second["reward"] == {"acc": 1.0, "reward": 0.5}
    assert [prompt["question"] for prompt in collected(tmp_path)["prompts"]] == ["What?", "What?"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"output": None}, "has a output.*got None in row 0"),
        ({"score": "high"}, "has a score.*'high'"),
        ({"step": 1.5}, "has a step"),
        ({"images": ["images/gone.png"]}, r"row 0 of .*1\.jsonl: an image file must exist"),
    ],
)
def test_what_is_no_rollout_is_refused(tmp_path, row, message):
    dump(tmp_path, 1, [row])
    with pytest.raises(ValueError, match=message):
        collected(tmp_path)


def test_a_step_that_is_not_there_is_refused(tmp_path):
    dump(tmp_path, 1, [{}])
    with pytest.raises(ValueError, match=r"got none of the steps \(2,\)"):
        write_page(Show(data=tmp_path, steps=(2,)))


def test_images_of_tools_are_those_of_their_rollout(tmp_path):
    image, part, lost = (store(tmp_path, Image.new("RGB", size, "red")) for size in ((40, 20), (10, 20), (5, 5)))
    rows = [{"images": [image], "tool_images": parts} for parts in ([], [part, image])]
    dump(tmp_path, 1, rows)
    content = collected(tmp_path)
    assert [rollout["tools"] for rollout in content["rollouts"]] == [[], [[1, 10, 20], [0, 40, 20]]]
    assert len(content["images"]) == 2 and content["prompts"][0]["images"] == [[0, 40, 20]]
    (tmp_path / lost).unlink()
    dump(tmp_path, 1, [{"tool_images": [lost]}])
    with pytest.raises(ValueError, match=r"1.jsonl.*: "):
        collected(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="the optional package chromium is not installed")
def test_a_browser_draws_it(tmp_path):
    """65 rollouts, the first of hostile text: the cards of the first screen, the box, and no script but the page's."""
    image = store(tmp_path, Image.new("RGB", (80, 40), "red"))
    rows = [{"output": HOSTILE + " <box>(250,500),(500,1000)</box>", "images": [image], "correct": False}]
    rows[0]["tool_images"] = [store(tmp_path, Image.new("RGB", (8, 4), "blue"))]
    dump(tmp_path, 1, [*rows, *({"output": f"answer {n}", "uid": f"q_{n}_0"} for n in range(64))])
    write_page(Show(data=tmp_path))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    done = subprocess.run([*command, str(tmp_path / "rollouts.html")], capture_output=True, text=True, timeout=120)
    dom = done.stdout
    assert "65 of 65 rollouts" in dom and dom.count("<article") >= 60 and "<title>Rollouts of" in dom
    box = re.search(r'<rect class="place" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', dom)
    assert [float(side) for side in box.groups()] == [20, 20, 20, 20]
    assert dom.count('aria-label="image of a tool"') == dom.count("returned by tools:") - 1 == 1
    assert dom.count("<script") == 2 and "&lt;script&gt;" in dom and "✗ wrong" in dom
