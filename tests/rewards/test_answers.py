# SPDX-License-Identifier: Apache-2.0
"""Ways in which people and models write answers, class by class: what is right, and what is nearly so and wrong."""

import doctest

import pytest

from avar_verl.rewards import choices, cleaning, expressions, quantities
from avar_verl.rewards.accuracy import accepted_answers, answer_options, extract_answer, grade_answer
from reward_fns.accuracy import compute_score

# class: ground truth: (right answers, wrong answers)
CLASSES = {
    "small and large numbers": {
        "1.6e-19": (
            ["1.6e-19", "1.60 \\times 10^{-19}", "1.6×10⁻¹⁹", "1.6 x 10^-19", "1.6E-19 C", "1.6*10^{-19}"],
            ["9.1e-31", "1.6e-18", "1.602e-19", "0", "-1.6e-19"],
        ),
        "6.63e-34": (["6.63 × 10^{-34} J·s"], ["1.05e-34", "6.62e-34"]),
        "0.0000012": (["1.2e-6", "1.2 \\times 10^{-6}"], ["0.0000013", "0.000001"]),
        "1.6 \\times 10^{-19} J": (["1.6e-19", "1.6e-19 J"], ["3.2 \\times 10^{-19} J", "1.6e-19 C"]),
        "\\frac{1}{10^{20}}": (["10^{-20}", "1e-20"], ["\\frac{1}{10^{21}}", "10^{-21}", "0"]),
        "0.00012": (["1.2 \\times 10^{-4}", "1.2e-4"], ["1.3 \\times 10^{-4}"]),
        "(1.6e-19, 2)": (["(1.6 \\times 10^{-19}, 2)"], ["(9.1e-31, 2)"]),
        "1e-20, 3": (["3, 1e-20"], ["3, 1e-21"]),
        "x = 1.6e-19": (["1.6e-19", "x = 1.6 \\times 10^{-19}"], ["x = 9.1e-31"]),
        "10^{-20} x": (["x \\times 10^{-20}"], ["10^{-21} x"]),
        "100\\pi": (["314.1593", "314.159265"], ["314.16", "314"]),
        "123456.7": (["123456.70", "123,456.7"], ["123456.8"]),
        "10000001": (["10,000,001"], ["10000000"]),
        "10": (["10.0", "+10", "ten", "1e1", "10^1"], ["100", "1", "0", "-10", "10.1"]),
    },
    "sets of letters": {
        "AC": (
            ["A、C", "A, C", "CA", "A和C", "(A)(C)", "A C", "AC", "A/C", "A & C", "A;C", "['A', 'C']", "[A, C]",
             "A,C.",
             "Both A and C", "Options A and C", "选AC", "选项A和C", "AC都正确", "A and C are correct",
             "**A** and **C**",
             "ＡＣ", "答案：A、C", "a, c", "A与C"],
            ["AD", "A", "C", "ABC", "A或C", "A or C", "AA", "", "ad", "不选AC"],
        ),
        "A,C": (["A/C", "AC", "C, A"], ["A,D", "A"]),
        "ABD": (["A, B and D", "A, B, and D", "B、A、D", "ABD", "(A), (B), (D)"], ["AB", "BAE", "A, B, C, D"]),
        "A": ([], ["AC", "A, B", "A or B", "AB", "A/B", "All"]),
        "①③": (["①、③", "③①", "①和③", "①③"], ["13", "①②", "①"]),
        "CBA": (["CBA"], ["ABC"]),  # An order, or a name: nobody writes a set so.
        "\\angle BAC": (["\\angle BAC"], ["\\angle ABC"]),
    },
    "letters with any lead-in, wrapping or text": {
        "A": (
            ["选 A", "我选择 A", "故选 A。", "答案是 A", "答案：A", "A选项", "选项A", "应选A", "正确答案为A",
             "因此选A",
             "所以答案是A。", "本题选A", "【答案】A", "答：A", "综上所述，选A", "答案选A", "A项",
             "A.猫", "A、猫", "A)猫", "A 猫", "A:cat", "A - cat", "“A”", "`A`", "(A) cat", "A：猫", "A．猫",
             "（A）猫", "A (cat)", "A（猫）", "我认为答案是A", "我觉得选A", "Choose A", "【A】",
             "「A」", "[A]", "{A}", "<A>", "'A'", "*A*", "**A**", "_A_", "A)", "A.", "a)", "**A**: cat", "**A.** cat",
             "A. cat", "A) cat", "A – cat", "A — cat", "[A] cat", "(a) cat", "Ａ", "Ⓐ", "<b>A</b>",
             "option A", "Option (A)", "choice A", "Answer: (A)", "Answer: A. cat", "**Answer:** A",
             "The answer is (A).",
             "The correct option is A", "The correct answer is option A.", "I choose A", "My answer is A", "It's A",
             "So the answer is A", "Therefore, A", "Ans: A", "(A) is correct", "A is the correct answer",
             "A because it has ears", "A, since it has ears", "\\text{A}", "\\mathrm{(A)}", "$\\textbf{(A)}$",
             "{\\bf A}", "\\bf{A}", "{\\rm (A)}", "${\\bf A}$", "\\boxed{{\\bf A}}", "{\\large\\bf A. cat}",
             "\\mathrm A", "\\bf A", "\\texttt{A}", "\\boldsymbol{A}", "{\\bfseries A}", "\\displaystyle A",
             "A\\ ", "A\\", "A\\\\", "\\ A", "A\\,", "A\\hspace{1em}", "A \\quad", "\\boxed{A\\ }", "(A)\\ ",
             "Answer - A", "Answer – A", "Final answer - A. cat", "Answer -> A", "Answer → A", "Answer => A",
             "The answer — (A)", "答案 - A", "答案→A", "Answer \\rightarrow A",
             "Answer-A", "Answer -- A", "Answer: - A", "Answer | A", "• A", "* A. cat", "# A", "> (A)",
             "\\textbf{\\textit{A}}", "{\\bf{A}}", "\\textsc{A}", "\\mathcal{A}",
             "\\boxed{A}", "\\fbox{A}", "\\boxed{\\text{A. cat}}", "\\mathbf{A}"],
            ["选 B", "不选A", "不是A", "A不对", "A是错的", "A或B", "除A以外", "not A", "It is not A",
             "The answer is not A",
             "A is incorrect", "A is not right", "A or B", "(A) or (B)", "A. cat, B. dog", "(A) cat (B) dog", "B. A",
             "B", "A.M.", "a.m.", "a:b", "f(A)", "AB", "(a)^2", "(A) + 1", "(a)-b", "Apple", "A cat", "a cat",
             "An", "cat", "B 猫", "A5"],
        ),
        "B. 12 cm": (["B", "(B) 12 cm", "12 cm", "12cm", "B: 12 centimeters"], ["B. 13 cm", "13 cm", "A. 12 cm",
         "C"]),
        "A. cat": (["A", "cat", "a cat", "(A)"], ["B", "dog", "A. dog"]),
        "cat": (["The cat.", "a cat", "It is a cat", "\"cat\"", "**Cat**", "It's a cat!"], ["cats and dogs",
         "not a cat"]),
    },
    "counts and number words": {
        "10": (
            ["10 objects", "ten", "10 (objects)", "10个", "十", "十个", "10 red cubes", "There are 10 objects.",
             "10 objects in the image", "10 people", "ten dogs", "图中有10个", "一共有10只猫", "共10个", "about 10",
             "10.", "10 in total", "10本书"],
            ["10 or more", "10 to 12", "100 objects", "1 object", "10 dogs and 2 cats", "10 million", "ten thousand",
             "10多个", "10个以上", "more than 10", "not 10", "no objects", "10%5", "dozen", "10 minus two",
             "10 out of 12",
             "10个或11个", "十一", "Figure 10", "10c", "10万"],
        ),
        "3 cats": (["3", "three cats", "3 cats in the image", "3 cat"], ["3 dogs", "2 cats", "3只狗", "4"]),
        "21": (["twenty-one", "twenty one", "二十一", "21st", "第21"], ["twelve", "twenty", "二十"]),
        "105": (["one hundred and five", "一百零五", "一百零五个"], ["one hundred", "一百五十"]),
        "2500000": (["2.5 million", "250万", "2,500,000 people"], ["2.5", "2.5 billion", "25万"]),
        "15000": (["1.5万", "一万五千", "15 thousand"], ["1.5", "15万"]),
        "-5": (["negative five", "minus 5", "−5", "负五", "–5"], ["5", "five"]),
        "1/2": (["half", "one half", "a half", "0.5", "½", "一半", "二分之一", "50%"], ["2", "one third", "1", "二"]),
        "2/3": (["two thirds", "two-thirds", "三分之二"], ["three halves", "二分之三", "2"]),
        "2.5": (["two and a half", "2 1/2", "二点五"], ["two", "2"]),
        "0": (
            ["zero", "零", "0 objects", "none", "None.", "None of them", "none are visible", "Nil", "none (0)",
             "0 (none)", "没有", "无",
             "一个都没有", "None in the image"],
            ["one", "10", "none of the above", "nothing", "no", "N/A", "none or one", "nonesuch", "没有狗"],
        ),
        "None": (["none", "0", "None of them"], ["1", "no", "None of the above"]),
        "5 dogs": (["five (5) dogs", "5 (five) dogs", "5 (five)"], ["5 (five) cats", "4 (five)"]),
        "1250": (["1,250 (1250)", "1250 (one thousand two hundred and fifty)", "1.25K", "1.25k"], ["1.25M", "125K"]),
        "five": (
            ["5", "5 apples", "五", "5 (five)", "five (5)", "5（五）", "五（5）", "Five (5).", "5 [five]",
             "5 (five) apples"],
            ["6", "fifty", "5 (four)", "6 (five)", "five (6)", "5 (fifty)"],
        ),
        "1000000": (
            ["1M", "1 million", "1,000K", "1000k", "$1M", "1M people", "$1m", "0.001B", "1mn", "€1M", "1 M",
             "1000 k", "1 mln"],
            ["1", "1m", "1K", "1B", "1 M x", "10M", "-1M", "1MM", "1Mb"],
        ),
        "2.5B": (["2.5 billion", "2500000000", "2.5bn", "2,500M", "2.5 bytes"], ["2.5M", "2500000"]),
        "$3M": (["3000000", "$3 million", "3M", "$3,000,000", "3 million dollars"], ["€3M", "3", "$3K"]),
        "5 K": (["5", "5 kelvin"], ["5000", "5 m"]),  # kelvin
        "3k": (["3k", "k \\cdot 3", "3000"], ["3m", "4k"]),  # a product, or three thousand
        "第三": (["third", "3rd", "第3", "3"], ["第二", "second"]),
        "12": (["a dozen", "one dozen eggs", "十二"], ["two dozen", "twenty"]),
        "三角形": (["三角形"], ["3", "四边形"]),
        "red": (["red", "Red."], ["10 red", "two"]),
    },
    "yes and no": {
        "yes": (
            ["Yes, there is a dog.", "Yes, it is", "yes.", "YES", "**Yes**", "Yes there is a dog", "Yes — it is",
             "True",
             "Yes; it is.", "Yes, there is no doubt about it", "是的", "是", "对", "Answer: yes", "Yes!"],
            ["No, there is no dog", "not yes", "yes and no", "yes or no", "Yes/No", "Yes, no", "no", "No, yes",
             "maybe",
             "eyes", "yesterday", "不是", "Not sure, yes", "False", "对称"],
        ),
        "no": (
            ["No, there is no dog", "No.", "No, it is not.", "No there isn't", "没有", "不是", "否", "False",
             "没有狗", "不", "No dogs", "no dog", "No dogs in the image.", "There are no dogs", "No visible dog"],
            ["Yes, there is", "not no", "no or yes", "none of them", "nothing", "No, yes", "notebook",
             "no doubt, yes", "no idea", "No doubt", "no dog or cat", "no more than 5", "no way to tell", "No. 5",
             "no answer", "no one knows", "No dogs but yes"],
        ),
        "No, there is no dog": (["No", "No, there is no dog"], ["No cats", "Yes"]),
        "no dogs": (["no dogs", "No dogs."], ["no cats", "no", "No, there is a cat"]),  # as a text
        "True": (["true", "yes", "True, because it is round"], ["False", "true or false", "untrue"]),
        "正确": (["正确", "对", "正确。"], ["不正确", "错误", "不对"]),
        "否": (["No", "不是"], ["是", "是的"]),
        "right": (["right", "Right."], ["yes", "left", "correct"]),  # A side.
        "Yes, there is a dog.": (["Yes", "yes, there is a dog"], ["No", "Yes, there is a cat"]),
    },
    "units": {
        "30": (
            ["30度", "30°", "30 degrees", "30^\\circ", "30 cm", "30cm", "30厘米", "30\\text{ cm}",
             "30 \\mathrm{~cm}^2",
             "30米", "30m", "30 (cm)", "30 km/h", "30千米/时", "30平方米", "30 square units", "$30", "\\$30", "US$30",
             "€30", "30元",
             "¥30", "30 dollars", "30%", "30 years old", "30岁", "30 N·m", "\\angle A = 30^\\circ", "30Ω", "30V",
             "x=30"],
            ["30x", "300 cm", "3 cm", "30 cm 5 mm", "30c", "-30°", "13°"],
        ),
        "25 °C": (["25 degrees Celsius", "25℃", "25°C", "25 ^\\circ C", "25摄氏度", "25", "25 C", "25°"],
                  ["25 °F", "25 degrees Fahrenheit", "25 K", "26 °C"]),
        "100 Ω": (["100 ohms", "100 ohm", "100欧姆", "100Ω", "100\\Omega", "100"], ["100 V", "100 kΩ", "10 Ω"]),
        "180": (["\\fbox{180}", "180°", "\\boxed{180^\\circ}", "\\underline{180}", "一百八十"], ["18", "\\fbox{80}"]),
        "5 m": (["5 meters", "5米", "5m", "5 metres", "5"], ["5 cm", "5厘米", "500 cm", "5 km", "5 m^2", "5 s",
         "5 apples"]),
        "5 m/s": (["5 meters per second", "5米/秒", "5米每秒", "5 m·s⁻¹", "5 m s^{-1}", "5\\,\\mathrm{m/s}"],
                  ["5 m/s^2", "5 km/h", "5 m", "5 s"]),
        "4千克": (["4", "4 kg", "4公斤", "4 kilograms", "四千克"], ["4000", "4克", "4 g", "4 lb"]),
        "10 m^2": (["10平方米", "10 square meters", "10㎡", "10 m²", "10 sq m"], ["10 m", "10 m^3", "10平方厘米"]),
        "4.2 J/(kg·K)": (["4.2 J/kg·K", "4.2 J kg^{-1} K^{-1}", "4.2"], ["4.2 J", "4.2 J/kg"]),
        "$5": (["5 dollars", "5", "$5.00", "USD 5"], ["€5", "50", "5 cents"]),
        "50%": (["0.5", "50", "50 percent", "百分之五十", "1/2", "50 ％"], ["5%", "0.05", "50 cm"]),
        "3-5": (["3–5", "3 to 5", "3~5", "3到5", "3 - 5"], ["-2", "3", "5", "3-6", "35", "3, 5"]),
        "220V": (["220", "220 V", "220伏", "220 volts"], ["220 A", "22"]),
        "5 km/h": (["5 kph", "5千米/小时", "5公里/小时", "5 kilometers per hour"], ["5 mph", "5 km"]),
        "12 cm": (["12 CM", "12 centimetres", "12厘米"], ["12 mm", "12 in", "12分米"]),
    },
    "dressing": {
        "5": (["５", "$5$", "\\(5\\)", "5.", "**5**", "`5`", "\\text{5}", "Answer: 5", "答案是5", "约5", "≈5",
         "\\textcolor{red}{5}"],
              ["5!", "\\sqrt{5}", "答案不是5", "Answer -5", "Answer: -5"]),
        "-5": (["Answer -5", "Answer: -5", "Answer - -5", "{\\bf -5}"][1:], ["Answer - 5", "5"]),
        "12 cm": (["{\\bf 12 cm}", "{\\rm 12\\ cm}", "12\\ cm", "12{\\rm cm}", "12 \\rm cm"], ["{\\bf 13 cm}"]),
        "\\{1, 2\\}": (["\\{1, 2\\}", "{\\{1,2\\}}"][:1], ["\\{1, 3\\}"]),
        "1234": (["1,234", "1，234", "1 234", "1{,}234"], ["1, 234", "1.234", "12,34"]),
        "\\frac{3}{4}": (["3/4", "0.75", "\\dfrac34", "¾", "75%", "3 / 4"], ["4/3", "3:5", "34", "0.7"]),
        "2:1": (["2:1", "2 : 1", "2：1"], ["1:2", "2, 1"]),
        "left": (["Left", "left.", "to the left"][:2], ["felt", "right", "left or right"]),
    },
}  # fmt: skip
TABLE = [
    (group, answer, truth, want)
    for group, cases in CLASSES.items()
    for truth, sides in cases.items()
    for want, answers in zip((True, False), sides, strict=True)
    for answer in answers
]


@pytest.mark.parametrize("group", CLASSES)
def test_classes(group):
    wrong = [
        (answer, truth, f"wanted {want}")
        for name, answer, truth, want in TABLE
        if name == group and grade_answer(answer, truth) is not want
    ]
    assert not wrong


def test_reward_and_extraction_see_the_same():
    assert extract_answer("<think>x</think>\\fbox{180}") == "180"
    assert compute_score("q", "<think>x</think><answer>\\fbox{180}</answer>", "180")["acc"] == 1.0


def test_what_cannot_be_evaluated_is_no_error():
    assert grade_answer("x=2, y=3", "2, 3") is True


def test_doctests():
    for module in (choices, cleaning, expressions, quantities):
        results = doctest.testmod(module)
        assert results.attempted and not results.failed


# --- Options ---

PETS = ["dog", "cat", "bird"]
OPTIONS = [
    # options, ground truth, right answers, wrong answers
    (PETS, "B", ["B", "B. cat", "cat", "the cat", "(b) a cat", "B cat", "A cat", "B.", "选B", "It is a cat.",
     "B: the one on the left"],
     ["A", "dog", "A. cat", "B. dog", "dog or cat", "D", "cats and dogs", "B or C", "A dog", "not a cat"]),
    (PETS, "cat", ["B", "cat", "B. cat"], ["A", "dog"]),  # The text of an option as the ground truth.
    (["A. dog", "B. cat", "(C) bird"], "B", ["B", "cat", "B. cat"], ["dog", "A. cat"]),  # Options with their letters.
    (["猫", "狗"], "A", ["A", "A猫", "A.猫", "猫", "A、猫", "选A", "答案是猫"], ["B", "狗", "A狗", "B猫"]),
    (["A型", "B型", "O型"], "B", ["B", "B型", "B. B型"], ["A型", "A", "C"]),
    (["B型", "A型"], "A", ["A", "B型"], ["B", "A型"]),  # A text that starts with another option's letter.
    (["B", "C", "A"], "A", ["A"], ["B", "C"]),  # A letter is the option, never its text.
    (["C", "D", "E"], "A", ["A", "(A)"], ["C", "B"]),
    (["1/2", "0.5"], "A", ["A"], ["0.5", "1/2", "B"]),  # The text of either.
    (["", "y"], "A", ["A"], ["x", "y"]),
    (PETS, "AC", ["AC", "A and C", "dog, bird", "dog and bird", "C、A", "A. dog, C. bird"],
     ["A", "AB", "dog", "dog, cat", "ABC", "dog, cat, bird"]),
    # A unit that all options share.
    (["10m", "20m", "30m", "50m"], "C", ["30", "30m", "30 m", "30 meters", "30米", "C", "C. 30m", "thirty"],
     ["10", "30 cm", "30 kg", "300", "3", "20m"]),
    (["15m", "15√{3}m", "30m"], "B", ["15√{3}", "15\\sqrt{3}", "15√3 m", "15\\sqrt{3}\\text{ m}"], ["15", "30",
     "15√2"]),
    (["6.20米", "5.10米", "4.00米"], "A", ["6.20", "6.2", "6.20米", "6.2 m"], ["4", "5.1", "6.20厘米"]),
    (["60°", "30°", "90°", "45°"], "D", ["45", "45°", "45度", "45 degrees", "45^\\circ"], ["60", "30", "4.5"]),
    (["4千克", "8千克"], "A", ["4", "4千克", "4 kg"], ["8", "4克", "4 g"]),
    (["10 cm", "10 m"], "A", ["10 cm", "A", "10厘米"], ["10", "10 m"]),  # No shared unit: the value fits both.
    (["3匹马", "5匹马"], "B", ["5", "5匹", "五"], ["3", "15"]),
    (["3 apples", "5 apples"], "B", ["5", "five apples", "5 apples"], ["3", "5 pears"]),
    (["$10", "$20"], "A", ["$10", "10", "10 dollars"], ["20", "€10"]),
    (["Yes", "No"], "B", ["No", "No, it is not", "B"], ["Yes", "A", "Yes, no"]),
    (["20\\sqrt{3}", "2√{2}m"], "A", ["(A) 20√3", "A. 20\\sqrt{3}", "A: \\text{20}\\sqrt{3}", "(A)"],
     ["(B) 2\\sqrt{2}m", "B. 2√2"]),
    (["1", "0", "None"], "C", ["None", "none.", "C"], ["0", "B", "1"]),  # A text before what it may mean.
    (["0", "1"], "A", ["None", "0", "none of them"], ["1", "None of the above"]),
    (["1M", "1K"], "A", ["1M", "1000000", "1 million"], ["1000", "1K"]),
    (["Yes", "No"], "B", ["No dogs", "no dog is there"], ["Yes, dogs", "no idea"]),
    (["half", "quarter", "quarter past"], "B", ["quarter", "1/4", "a quarter"], ["half", "quarter past"]),
    (["2x", "3x"], "A", ["2x", "x \\cdot 2"], ["3x"]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "truth", "right", "wrong"), OPTIONS)
def test_options(options, truth, right, wrong):
    assert [answer for answer in right if not grade_answer(answer, truth, options)] == []
    assert [answer for answer in wrong if grade_answer(answer, truth, options)] == []
    reward = [
        compute_score("q", f"<think>x</think><answer>{a}</answer>", truth, {"options": options})["acc"]
        for a in (*right, *wrong)
    ]
    assert reward == [1.0] * len(right) + [0.0] * len(wrong), "the reward of the same row"


def test_forms_of_options():
    import numpy as np

    assert answer_options(None) == answer_options({}) == answer_options({"options": None}) == ()
    assert answer_options({"options": np.array(["a", "b"], dtype=object)}) == ("a", "b")
    assert answer_options({"options": {"A": "a", "B": "b", "C": None}}) == ("a", "b")
    assert answer_options({"options": [1, 2.5]}) == ("1", "2.5")


@pytest.mark.parametrize("options", ["['a', 'b']", 3, ["a", None], ["a"] * 11, {"x": "a", "y": "b"}, [["a"]]])
def test_options_of_another_form_are_refused(options):
    with pytest.raises(ValueError, match="'options'.* must be a list of at most 10 texts, .* index 4"):
        compute_score("q", "<answer>A</answer>", "A", {"options": options, "index": 4})


@pytest.mark.parametrize("truth", ["D", "fish", 3, "A or B", "AD"])
def test_a_ground_truth_must_name_an_option(truth):
    with pytest.raises(ValueError, match="letter of one of 3 options; got .* index 4"):
        compute_score("q", "<answer>A</answer>", truth, {"options": PETS, "index": 4})


# --- Decimals of the ground truth ---

ROUNDED = {
    "3.14": (["3.1416", "\\pi", "3.14", "3.144", "3.135"], ["3.15", "3.1", "3", "3.1451", "22"]),
    "0.33": (["1/3", "0.333", "0.3333"], ["0.3", "0.34", "1/2"]),
    "13": (["12.8", "13.4", "\\sqrt{169}"], ["12.4", "14", "13.6"]),
    "1.6e-19": (["1.602e-19", "1.602 \\times 10^{-19}"], ["1.7e-19", "1e-19", "0"]),
    "1.73 cm": (["\\sqrt{3}", "\\sqrt{3} cm", "1.732"], ["\\sqrt{2}", "1.732 m"]),
    "33.3%": (["1/3", "33.33%", "0.3333"], ["0.34", "33%"]),
    "\\frac{1}{3}": (["1/3", "0.333333"], ["0.33"]),  # No decimals to round to.
}


@pytest.mark.parametrize("truth", ROUNDED)
def test_decimals_of_the_ground_truth(truth):
    right, wrong = ROUNDED[truth]
    assert [answer for answer in right if not grade_answer(answer, truth, decimals="ground_truth")] == []
    assert [answer for answer in wrong if grade_answer(answer, truth, decimals="ground_truth")] == []


@pytest.mark.parametrize("name", ["accuracy", "avar", "format", "visual_anchor", "grounding_iou"])
def test_every_reward_rounds_on_request_only(name):
    import importlib

    reward = importlib.import_module(f"reward_fns.{name}").compute_score
    info = {"boxes": [], "boxes_size": [10, 10]}
    row = ("q", "<think>x</think><answer>3.1416</answer>", "3.14", info)
    assert reward(*row)["acc"] == reward(*row, decimals="exact")["acc"] == 0.0
    assert reward(*row, decimals="ground_truth")["acc"] == 1.0
    with pytest.raises(ValueError, match="decimals must be one of .*; got 2"):
        reward(*row, decimals=2)


# --- Ground truths that no answer can meet ---


@pytest.mark.parametrize(
    "truth",
    [
        "Answer: the work would take 180 days.\nTherefore, the answer is: 180.",
        "#### 72",
        "She sold 48 / 2 = 24 clips.\n#### 72",
        "<think>x</think><answer>5</answer>",
        "<answer>5</answer>",
        '["cat"]',
        "['cat', 'a cat']",
        '{"answer": "cat"}',
        "B\nExplanation: the cat is on the left.",
        "故选B。解析：因为有猫",
        "因为有猫，所以答案是B",
        "$",
        "\\boxed{}",
        "**",
    ],
)
def test_solutions_are_no_ground_truths(truth):
    with pytest.raises(ValueError, match="must be the final answer alone, as text; got .* for this sample. Take"):
        accepted_answers(truth)


@pytest.mark.parametrize(
    "truth",
    [
        "The answer is 5",
        "答案：A",
        "\\boxed{5}",
        "[1, 2]",
        "\\{1, 2\\}",
        "{a, b}",
        "line 1\nline 2",
        "A. cat",
        "#5",
        "N/A",
    ],
)
def test_answers_with_dressing_are_ground_truths(truth):
    assert accepted_answers(truth) == [truth]
    assert grade_answer(truth, truth)


# --- In the shape of MathVista's extracted answers: question type, options, right answer, extracted answer, verdict ---

MATHVISTA = [
    ((), "1.2", "1.2", True), ((), "1.2", "0.11", False), ((), "1.2", "1.20", True), ((), "1.2", "1.2 cm", True),
    ((), "145", "145", True), ((), "145", "145.0", True), ((), "145", "145°", True), ((), "145", "54", False),
    ((), "5", "5.0", True), ((), "5", "five", True), ((), "5", "-5", False), ((), "5", "", False), ((), "5", "N/A",
     False),
    ((), "5", "x", False), ((), "0", "0", True), ((), "0", "No objects", False), ((), "1000", "1,000", True),
    ((), "[1990, 2000]", "[1990, 2000]", True), ((), "[1990, 2000]", "[1990, 2001]", False),
    ((), "0.5", "1/2", True), ((), "46", "46 million", False), ((), "46", "46 years", True), ((), "2", "2009", False),
    (("6cm", "7cm", "4cm", "5cm"), "A", "6cm", True), (("6cm", "7cm", "4cm", "5cm"), "A", "6", True),
    (("6cm", "7cm", "4cm", "5cm"), "A", "D", False), (("6cm", "7cm", "4cm", "5cm"), "A", "(A) 6cm", True),
    (("6cm", "7cm", "4cm", "5cm"), "A", "7cm", False), (("Yes", "No"), "A", "Yes", True), (("Yes", "No"), "A",
     "No", False),
    (("Yes", "No"), "A", "No, it does not", False), (("Yes", "No"), "B", "no", True), (("Yes", "No"), "B", "A",
     False),
    (("3/11", "8/11", "6/11", "3/5"), "C", "6/11", True), (("3/11", "8/11", "6/11", "3/5"), "C", "\\frac{6}{11}",
     True),
    (("3/11", "8/11", "6/11", "3/5"), "C", "3/11", False), (("5", "6", "7", "8"), "B", "6", True),
    (("5", "6", "7", "8"), "B", "C", False), (("Purple", "Dark Red"), "B", "dark red", True),
    (("Purple", "Dark Red"), "B", "Red", False), (("no change", "shift left"), "A", "A", True),
    (("no change", "shift left"), "A", "shift left", False), (("27°", "54°", "63°"), "C", "63", True),
]  # fmt: skip


@pytest.mark.parametrize(("options", "truth", "extracted", "verdict"), MATHVISTA)
def test_verdicts_in_the_shape_of_mathvista(options, truth, extracted, verdict):
    assert grade_answer(extracted, truth, options) is verdict
