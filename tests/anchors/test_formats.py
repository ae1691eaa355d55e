# SPDX-License-Identifier: Apache-2.0
"""Every format of the table: span, numbers as written, kind and label."""

import pytest

from avar_verl.anchors import parse_anchors, to_pixels
from avar_verl.anchors.formats import FORMATS

# format, text, [(reference, coords, label)]
CASES = [
    (
        "bbox_2d_json",
        '```json\n[\n  {"bbox_2d": [31, 64, 207, 350], "label": "kettle"},\n'
        '  {"bbox_2d": [220, 70, 402, 366], "name_zh": "水壶"}\n]\n```',
        [("[31, 64, 207, 350]", (31, 64, 207, 350), "kettle"), ("[220, 70, 402, 366]", (220, 70, 402, 366), "水壶")],
    ),
    ("bbox_2d_json", '{"label": "mug", "bbox_2d": [5, 6, 70, 80]', [("[5, 6, 70, 80]", (5, 6, 70, 80), "mug")]),
    ("bbox_2d_json", '{"bbox_2d": [[5, 6, 70, 80]]}}', [("[5, 6, 70, 80]", (5, 6, 70, 80), None)]),
    ("bbox_2d_json", "{'bbox_2d': [5, 6, 70, 80], 'label': 'mug'}", [("[5, 6, 70, 80]", (5, 6, 70, 80), "mug")]),
    ("point_2d_json", '{"point_2d": [318, 42], "label": "lamp"}', [("[318, 42]", (318, 42), "lamp")]),
    (
        "grit_dupkey_json",
        '{"bbox_2d": [1, 2, 33, 44], "label": "boot", "bbox_2d": [50, 60, 77, 88], "label": "lace"}',
        [("[1, 2, 33, 44]", (1, 2, 33, 44), "boot"), ("[50, 60, 77, 88]", (50, 60, 77, 88), "lace")],
    ),
    (
        "visual_rft_json",
        "<answer>[{'Position': [12, 20, 400, 610], 'Confidence': 0.8}]</answer>",
        [("[12, 20, 400, 610]", (12, 20, 400, 610), None)],
    ),
    (
        "gemini_box_2d",
        '[{"box_2d": [100, 640, 420, 810], "label": "crane"}]',
        [("[100, 640, 420, 810]", (100, 640, 420, 810), "crane")],
    ),
    ("point_2d_json", '[{"point": [510, 222], "label": "valve"}]', [("[510, 222]", (510, 222), "valve")]),
    (
        "qwen2vl_special",
        "<|object_ref_start|>the tram<|object_ref_end|><|box_start|>(72, 310),(498, 705)<|box_end|>",
        [("(72, 310),(498, 705)", (72, 310, 498, 705), "the tram")],
    ),
    (
        "qwenvl_ref_box",
        "<ref>two boats</ref><box>(10,20),(110,90)</box><box>(400,25),(520,99)</box>",
        [
            ("(10,20),(110,90)", (10, 20, 110, 90), "two boats"),
            ("(400,25),(520,99)", (400, 25, 520, 99), "two boats"),
        ],
    ),
    (
        "qwenvl_quad",
        "<ref>sign</ref><quad>(10,20),(110,25),(112,60),(9,58)</quad>",
        [("(10,20),(110,25),(112,60),(9,58)", (10, 20, 110, 25, 112, 60, 9, 58), "sign")],
    ),
    (
        "qwen_stripped_pair",
        "wooden bench(88,512),(640,930)",
        [("(88,512),(640,930)", (88, 512, 640, 930), "wooden bench")],
    ),
    (
        "qwenvl_html",
        '<h2 data-bbox="61 90 545 120">Quarterly report</h2>',
        [("61 90 545 120", (61, 90, 545, 120), "Quarterly report")],
    ),
    (
        "gui_coordinate",
        '{"name": "mobile_use", "arguments": {"action": "click", "coordinate": [540, 1180]}}',
        [("[540, 1180]", (540, 1180), None)],
    ),
    ("gui_coordinate", "pyautogui.click(540, 1180)", [("(540, 1180)", (540, 1180), None)]),
    ("uitars_box", "Action: click(start_box='(212,377)')", [("(212,377)", (212, 377), None)]),
    ("uitars_box", "start_box='<|box_start|>(212,377)<|box_end|>'", [("(212,377)", (212, 377), None)]),
    ("uitars_region", "scroll(start_box='[10, 20, 300, 400]')", [("[10, 20, 300, 400]", (10, 20, 300, 400), None)]),
    (
        "deepeyes_tool_call",
        '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [610, 88, 702, 190], "label": "cap"}}',
        [("[610, 88, 702, 190]", (610, 88, 702, 190), "cap")],
    ),
    (
        "qwen_tool_call",
        '[TOOL_CALL] image_zoom_in_tool\n{"label": "plate", "bbox_2d": [310, 402, 377, 450], "img_idx": 0}',
        [("[310, 402, 377, 450]", (310, 402, 377, 450), "plate")],
    ),
    (
        "pixel_reasoner_tool_call",
        '<tool_call>\n{"name": "crop_image_normalized", "arguments": {"bbox_2d": [0.1, 0.25, 0.4, 0.5]}}\n</tool_call>',
        [("[0.1, 0.25, 0.4, 0.5]", (0.1, 0.25, 0.4, 0.5), None)],
    ),
    (
        "treevgr_box",
        "<think>the blue van <box>[14,220,190,333]</box> stands left</think>",
        [("[14,220,190,333]", (14, 220, 190, 333), None)],
    ),
    (
        "internvl_ref_box",
        "<ref>oars</ref> <box>[[50, 61, 210, 330], [402, 77, 590, 341]]</box>",
        [
            ("[50, 61, 210, 330]", (50, 61, 210, 330), "oars"),
            ("[402, 77, 590, 341]", (402, 77, 590, 341), "oars"),
        ],
    ),
    ("internvl_stripped", "umbrella[[12, 40, 333, 871]]", [("[12, 40, 333, 871]", (12, 40, 333, 871), "umbrella")]),
    (
        "molmo_point",
        '<point x="41.5" y="77.0" alt="the tap">the tap</point>',
        [('x="41.5" y="77.0"', (41.5, 77.0), "the tap")],
    ),
    (
        "molmo_points_xml",
        '<points x1="12.5" y1="30.1" x2="61.0" y2="33.4" alt="wheels">wheels</points>',
        [('x1="12.5" y1="30.1"', (12.5, 30.1), "wheels"), ('x2="61.0" y2="33.4"', (61.0, 33.4), "wheels")],
    ),
    (
        "qwen_points_xml",
        '<points x1="154" y1="604" x2="61" y2="334">wheels</points>',
        [('x1="154" y1="604"', (154, 604), "wheels"), ('x2="61" y2="334"', (61, 334), "wheels")],
    ),
    (
        "molmo2_coords",
        '<points coords="1 1 073 160 2 353 725">oars</points>',
        [("073 160", (73, 160), "oars"), ("353 725", (353, 725), "oars")],
    ),
    (
        "paligemma_loc",
        "<loc0100><loc0200><loc0612><loc0900> cat ; <loc0000><loc0010><loc0020><loc1023> sofa",
        [
            ("<loc0100><loc0200><loc0612><loc0900>", (100, 200, 612, 900), "cat"),
            ("<loc0000><loc0010><loc0020><loc1023>", (0, 10, 20, 1023), "sofa"),
        ],
    ),
    (
        "kosmos_patches",
        "<phrase> a red kite</phrase><object><patch_index_0033><patch_index_0700></object>",
        [("<patch_index_0033><patch_index_0700>", (33, 700), "a red kite")],
    ),
    (
        "cogvlm_box",
        "a tall vase [[097,514,283,996;310,500,420,990]]",
        [
            ("097,514,283,996", (97, 514, 283, 996), "a tall vase"),
            ("310,500,420,990", (310, 500, 420, 990), "a tall vase"),
        ],
    ),
    (
        "llava_shikra_norm",
        "The rider[0.262,0.195,0.501,0.603] waves.",
        [("[0.262,0.195,0.501,0.603]", (0.262, 0.195, 0.501, 0.603), "The rider")],
    ),
    ("shikra_norm_point", "The ball[0.310,0.725] is flat.", [("[0.310,0.725]", (0.31, 0.725), "The ball")]),
    (
        "deepseek_det",
        "<|ref|>the gate<|/ref|><|det|>[[120, 77, 400, 998]]<|/det|>",
        [("[120, 77, 400, 998]", (120, 77, 400, 998), "the gate")],
    ),
    (
        "glm_begin_of_box",
        "<|begin_of_box|>[[120, 77, 400, 998]]<|end_of_box|>",
        [("[120, 77, 400, 998]", (120, 77, 400, 998), None)],
    ),
    (
        "vlm_r1_answer",
        "<answer>{the fox [55, 12, 300, 204]}</answer>",
        [("[55, 12, 300, 204]", (55, 12, 300, 204), "the fox")],
    ),
    ("seed_bbox", "<bbox>101 222 303 444</bbox>", [("101 222 303 444", (101, 222, 303, 444), None)]),
    ("seed_point", "<point>101 222</point>", [("101 222", (101, 222), None)]),
    (
        "bare_untagged",
        "The bounding box of the oven is [44, 52, 310, 290].",
        [("[44, 52, 310, 290]", (44, 52, 310, 290), "oven is")],
    ),
    ("bare_untagged", "I see a cup at [40, 60, 90, 120].", [("[40, 60, 90, 120]", (40, 60, 90, 120), "a cup at")]),
    ("bare_untagged", "The red car (120, 40, 380, 210) is", [("(120, 40, 380, 210)", (120, 40, 380, 210), "red car")]),
    ("bare_untagged", "Top left [0, 0, 56, 56] shows", [("[0, 0, 56, 56]", (0, 0, 56, 56), "Top left")]),
    ("bare_untagged", "The dog [12, 30, 300, 400] runs", [("[12, 30, 300, 400]", (12, 30, 300, 400), "dog")]),
    ("bare_untagged", "`[0, 15, 640, 90]` -> sky", [("[0, 15, 640, 90]", (0, 15, 640, 90), None)]),
    ("bare_point", "The red button is located at (412, 288).", [("(412, 288)", (412, 288), None)]),
    (
        "gemini_point",
        '{"box_2d": [100, 640, 100, 810]} [{"point": [120, 700], "label": "hook"}]',
        [("[120, 700]", (120, 700), "hook")],
    ),
    (
        "florence_loc",
        "cat<loc_95><loc_86><loc_901><loc_918>dog<loc_5><loc_6><loc_70><loc_80><loc_1><loc_2><loc_30><loc_40>",
        [
            ("<loc_95><loc_86><loc_901><loc_918>", (95, 86, 901, 918), "cat"),
            ("<loc_5><loc_6><loc_70><loc_80>", (5, 6, 70, 80), "dog"),
            ("<loc_1><loc_2><loc_30><loc_40>", (1, 2, 30, 40), "dog"),
        ],
    ),
    (
        "named_corners",
        '{"ymin": 20, "xmin": 10, "ymax": 220, "xmax": 110, "label": "cat"}',
        [('"ymin": 20, "xmin": 10, "ymax": 220, "xmax": 110', (10, 20, 110, 220), "cat")],
    ),
    ("named_point", "pyautogui.click(x=540, y=118)", [("x=540, y=118", (540, 118), None)]),
    ("code_crop", "part = img.crop((40, 60, 400, 300))", [("(40, 60, 400, 300)", (40, 60, 400, 300), None)]),
]


@pytest.mark.parametrize(("name", "text", "expected"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_format(name, text, expected):
    anchors = parse_anchors(text)
    assert [(text[a.start : a.end], a.coords) for a in anchors] == [(span, coords) for span, coords, _ in expected]
    assert {a.format for a in anchors} == {name}
    assert {a.kind for a in anchors} == {FORMATS[name].kind}
    if name not in ("bare_untagged", "bare_point"):  # the words before a box in prose are a guess
        assert [a.label for a in anchors] == [label for *_, label in expected]


def test_every_row_has_a_case():
    assert {name for name, *_ in CASES} == set(FORMATS)


@pytest.mark.parametrize(
    "text",
    [
        "The solution set is [0, 4].",
        "x lies in [2, 5) or (1, 3].",
        "The line passes through (120, 340) and (200, 500).",
        "Point A(120, 340) is the vertex.",
        "The slope between (1, 2),(3, 4) is 1.",
        "softmax gives [0.1, 0.2, 0.3, 0.4]",
        "Scores: [0.05, 0.15, 0.35, 0.45]",
        "The data are [12, 18, 25, 31].",
        "The years [1998, 2004, 2010, 2016] had floods.",
        "The matrix [[10, 20, 30, 40], [50, 60, 70, 80]] has rank 2.",
        "A = [[1, 2], [3, 4]]",
        "values = [30, 40, 50, 60]",
        '{"scores": [30, 40, 50, 60]}',
        '{"bbox_3d": [0.1, 0.2, 1.5, 0.4, 0.5, 0.6, 0.0, 0.1, 0.2], "label": "car"}',
        '{"bbox_2d": [x1, y1, x2, y2], "label": "name"}',
        "<box>[x1, y1, x2, y2]</box>",
        "Answer in the format [100, 200, 300, 400].",
        '{"bbox_2d": [10, 20, 30',
        '{"bbox_2d": [10, 20, 30]}',
        '{"bbox_2d": [10, 20, , 40]}',
        '{"bbox_2d": [30, 20, 10, 40]}',  # x2 < x1
        '{"bbox_2d": [10, 40, 30, 20]}',  # y2 < y1
        '{"bbox_2d": [10, 20, 10, 40]}',  # no width
        '{"bbox_2d": [10, 20, 30, 20]}',  # no height
        '{"bbox_2d": [10, 20, 30, 999999999999]}',
        "<|box_start|>(10,20),(30",
        "<ref>dog</ref><box>(10,20)</box>",
        "<ref>dog</ref><box>[[10, 20, 1300, 400]]</box>",
        "<|det|>[[10, 20, 30, 9999]]<|/det|>",
        "<loc0100><loc0200><loc0300>",
        "<loc0500><loc0200><loc0300><loc0400>",  # y2 < y1
        "<loc0100><loc0200><loc1024><loc0400>",
        "<patch_index_0863><patch_index_0044>",
        "<patch_index_0001><patch_index_2000>",
        '<point x="120.5" y="20.0">a</point>',
        '<point x="20.5"',
        "<|begin_of_box|>42<|end_of_box|>",
        "<|begin_of_box|>(3, 4)<|end_of_box|>",
        "<|begin_of_box|>[1, 2, 3, 4]<|end_of_box|>",
        "f(100, 200) = 3",
        "the value is 120, 40, 380, 210",
        "1, 2, 3",
        "",
    ],
)
def test_no_coordinates(text):
    assert [a for a in parse_anchors(text) if a.kind != "phrase"] == []


def test_full_width_forms_read_like_ascii():
    wide = '"bbox_2d"\uff1a\uff3b\uff11\uff10\uff0c\uff12\uff10\uff0c\uff13\uff10\uff0c\uff14\uff10\uff3d'
    (anchor,) = parse_anchors(wide)
    assert anchor.coords == (10, 20, 30, 40)
    assert wide[anchor.start : anchor.end] == wide[10:]


def test_zero_width_characters_break_a_group():
    assert parse_anchors('{"bbox_2d": [10, 2\u200b0, 30, 40]}') == []


def test_other_digits_are_not_numbers():
    assert parse_anchors('{"bbox_2d": [\u0661\u0660, \u0662\u0660, \u0663\u0660, \u0664\u0660]}') == []


@pytest.mark.parametrize(
    "text",
    [
        '{"bbox_2d": [10, 20, 110, 220,], "label": "cat"}',
        '{"bbox_2d": ["10", "20", "110", "220"], "label": "cat",}',
        '{"bbox_2d": "10, 20, 110, 220", "label": "cat"}',
        '{"bbox_2d": [10 20 110 220], "label": "cat"}',
        '{"bbox_2d": [10, 20, 110, 220, 0.97], "label": "cat"}',
        '{"bbox_2d": [10, 20, 110, 220, 97], "label": "cat"}',
        '{"bbox_2d": [[10, 20], [110, 220]], "label": "cat"}',
        '{"bbox": {"x1": 10, "y1": 20, "x2": 110, "y2": 220}, "label": "cat"}',
        '{"label": "cat", "x0": "10", "y0": "20", "x1": "110", "y1": "220"}',
        '{"left": 10, "top": 20, "right": 110, "bottom": 220, "label": "cat"}',
        '{"x_min": 10, "y_min": 20, "x_max": 110, "y_max": 220, "label": "cat"}',
        '{"x": 10, "y": 20, "width": 100, "height": 200, "label": "cat"}',
        '{"cx": 60, "cy": 120, "w": 100, "h": 200, "label": "cat"}',
        '{"top_left": [10, 20], "bottom_right": [110, 220], "label": "cat"}',
        '{"top_left": {"x": 10, "y": 20}, "bottom_right": {"x": 110, "y": 220}, "label": "cat"}',
        r"{\"bbox_2d\": [10, 20, 110, 220], \"label\": \"cat\"}",
        r"[\n {\"bbox_2d\": [\n 10,\n 20,\n 110,\n 220\n],\n \"label\": \"cat\"}\n]",
        "cat<loc_10><loc_20><loc_110><loc_220>",
    ],
)
def test_json_as_models_write_it(text):
    (anchor,) = parse_anchors(text, (640, 480))
    assert anchor.coords == (10, 20, 110, 220) and anchor.label == "cat"


@pytest.mark.parametrize(
    "text",
    ["<box x1=10 y1=20 x2=110 y2=220>", "<bbox_2d>10, 20, 110, 220</bbox_2d>", "<|box_start|>10,20,110,220<|box_end|>"]
    + [
        "<h2 data-bbox=10 20 110 220>Report</h2>",
        "<box>[[10, 20], [110, 220]]</box>",
        "<box>[10, 20, 110, 220, 0.9]</box>",
    ]
    + ["Box(x1=10, y1=20, x2=110, y2=220)"],
)
def test_tags_without_quotes(text):
    assert [a.coords for a in parse_anchors(text)] == [(10, 20, 110, 220)]


@pytest.mark.parametrize(
    "text",
    [
        "click(540, 118)",
        "pyautogui.click(540, 118, clicks=2)",
        "click(x=540, y=118)",
        "left_double(540, 118)",
        "click(start_box='(540,118)')",
        "click(start_box='[540, 118]')",
        "click(start_box='540 118')",
        "click(point='<point>540 118</point>')",
        "click(start_box='<bbox>540 118 540 118</bbox>')",
        '{"action": "click", "x": 540, "y": 118}',
        '{"action": "click", "point": {"x": 540, "y": 118}}',
        "<click>540, 118</click>",
        "<point x=540 y=118>",
    ],
)
def test_clicks(text):
    assert [(a.kind, a.coords) for a in parse_anchors(text)] == [("point", (540, 118))]


def test_points_are_y_first_where_boxes_are():
    box, point = '{"box_2d": [100, 640, 420, 810]}', '{"point": [120, 700], "label": "hook"}'
    assert [a.format for a in parse_anchors(point + box)] == ["gemini_point", "gemini_box_2d"]
    assert [to_pixels(a, (500, 1000)) for a in parse_anchors(point + box)] == [(350, 120), (320, 100, 405, 420)]
    assert [a.format for a in parse_anchors(point)] == ["point_2d_json"]


@pytest.mark.parametrize(
    "text",
    [
        "The slope uses x1 = 3, y1 = 4, x2 = 60, y2 = 80.",
        "Take (x1 = 3, y1 = 4, x2 = 60, y2 = 80).",
        '{"width": 100, "height": 200}',
        '{"x": 3, "y": 4}',
        "f(x=3, y=4)",
        "<loc_10><loc_20><loc_30>",
        '{"scores": ["10", "20", "110", "220"]}',
    ],
)
def test_fields_that_are_no_places(text):
    assert [a for a in parse_anchors(text) if a.kind != "phrase"] == []
