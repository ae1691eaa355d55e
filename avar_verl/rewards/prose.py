# SPDX-License-Identifier: Apache-2.0
"""Words that describe something, in contrast to words that any reasoning can be filled with. Pure Python.

A word describes if it is none of these: grammar (`the`, `there`), a step of reasoning (`next`, `check`, `answer`), a
verb of looking or a word for the image (`look`, `picture`), a place in it (`left`, `corner`), a name for anything
(`object`, `region`), a number, a word of the question, or noise (`xkcd`, `aaa`, `x7`). So words of a language other
than English describe, except short ones. Of Chinese, each character counts as part of a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator

from avar_verl.anchors.phrases import IMAGE_WORDS, LOOKING_WORDS, PLACE_WORDS

WORD_WEIGHT = 5
"""Weight of a word; a Chinese character weighs `CHARACTER_WEIGHT`."""
CHARACTER_WEIGHT = 2

_GRAMMAR = """
a an the this that these those such same other others another each every all any some both either neither none no not
nor one ones two three four five six seven eight nine ten eleven twelve hundred thousand dozen half third quarter
first second fourth fifth sixth seventh eighth ninth tenth last former latter once twice thrice many much more most
few fewer fewest less least several enough lot lots bit i me my mine we us our ours you your yours he him his she her
hers it its they them their theirs who whom whose which what where when why how myself ourselves yourself himself
herself itself themselves someone somebody something somewhere anyone anybody anything anywhere everyone everybody
everything everywhere nobody nothing nowhere whatever whichever whoever wherever whenever however am is are was were
be been being do does did done doing have has had having can could will would shall should may might must ought need
needs needed dare let lets get gets got getting gotten go goes went gone going come comes came coming and or but if
then else so because since although though while whereas unless until till whether than as like unlike of to in on at
by for from with without within into onto out off over under above below up down between among amongst through
throughout across along around about against toward towards before after behind beside besides beyond near nearby next
during despite except per via upon underneath beneath inside outside opposite here there now later soon ever never
always often sometimes usually again also too very quite rather really just only even still yet already almost nearly
hardly maybe perhaps indeed together apart away back forth yes ok okay well oh ah hmm please thanks isn't aren't
wasn't weren't don't doesn't didn't haven't hasn't hadn't can't couldn't won't wouldn't shouldn't mustn't i'm i've
i'll i'd we're we've we'll we'd you're you've it's it'll that's there's here's what's let's they're etc eg ie vs ve ll
re isn aren wasn weren don doesn didn haven hasn hadn couldn won wouldn shouldn
"""
_REASONING = """
think thinking thought consider consideration reason reasoning reasonable reasonably logic logical logically
understand understanding know known knowing knowledge believe belief assume assumption assuming suppose guess guessing
estimate estimation expect expected expecting wonder decide decision decided determine determining determined find
finding found figure solve solving solved solution answer answering answered question problem task step stage phase
part piece process proceed proceeding procedure approach method way manner strategy plan planning idea point matter
case fact example instance detail information info data evidence clue context content result outcome conclusion
conclude concluding concluded final finally finalize end ending ended begin beginning start starting started continue
continuing continued finish finished complete completed completely move moving keep keeping kept hold try trying tried
attempt make making made take taking took taken give giving given put set use used using work working want wanted mean
meaning meant say said saying tell told state stated mention mentioned ask asked asking call called name named note
noted noting remember recall mind careful carefully careless close closely precise precisely exact exactly accurate
accurately correct correctly right wrong true false sure certain certainly uncertain clear clearly obvious obviously
evident evidently apparent apparently likely unlikely possible possibly possibility possibilities probable probably
definite definitely simple simply easy easily hard difficult main mainly important importantly relevant necessary
necessarily useful helpful key specific specifically general generally particular particularly overall whole entire
entirely total totally full fully rest remaining remainder additional additionally further furthermore moreover
therefore thus hence accordingly consequently meanwhile otherwise instead anyway actually basically essentially
initially originally eventually ultimately previously previous following subsequent subsequently current currently
present afterwards thereafter respectively similarly likewise conversely alternatively namely thing stuff kind sort
type form item object element entity entities component feature aspect property attribute subject target candidate
option choice alternative label labeled labelled title box boxes bounding bbox coordinate pixel location position
positioned located place placed spot site area region zone section segment portion patch crop cropped mark marked
marker reference refer number count counting counted digit value amount quantity size compare comparing compared
comparison check checking checked verify verifies verifying verified verification confirm confirming confirmed
confirmation recheck review reviewing reviewed revisit inspect examine analyze analyse analysis analyzing assess
evaluate evaluation evaluating explore exploring identify identifying identified identification recognize recognise
detect detected detection detecting locate locating focus focusing focused attention attend notice noticing noticed
observe observing observed observation search searching scan scanning pay paying visible visual visually view appear
appeared seem seemed show showing shown display depict describe described description include including included
contain containing contained consist exist existing belong correspond corresponding match matches matching matched
relate related relation connection different difference differently similar equal equally unique distinct separate
separately various good great best better nice fine bad worse worst big bigger biggest large larger largest small
smaller smallest little long longer short shorter high higher low lower new old early late quick quickly slow slowly
time moment day help helping lead leading led change changing changed happen become remain stay add adding added
remove removed reach reached pass passed turn turned write written read reading require required request requirement
able unable allow based according regard regarding respect account order list listed listing sequence series group
pair row column line support supported suggest suggested indicate indicated imply implies reveal provide provided
prove proof explain explanation define definition rule apply applies applied obtain obtained gather gathered collect
collected combine combined summarize summary sum ensure ensuring avoid mistake error doubt confidence confident
confidently sense alt img href src json markdown html null consistent consistency reliable patience patiently thorough
thoroughly steady steadily gradually individually simultaneously straightforward straightforwardly settle settled
settling choose choosing chose chosen pick picked select selected selecting selection eliminate hypothesis
interpretation interpret judge judging judgment judgement inference infer inferred derive derived deduce deduced
deduction calculate calculation compute computing reconsider rethink reflect reflection ponder contemplate hesitate
pause wait ahead carry manage tackle address deal return returning returned repeat repeating repeated repetition
effort goal aim purpose intention direction overlook overlooked overlooking miss missed missing worth worthy far
establish established establishing sanity sane follow followed directly indirect break breaking broken system
systematic systematically alright feel feeling felt fairly perspective narrow narrowing broad broaden putting leave
leaving left fortunately unfortunately hopefully luckily sadly honestly frankly jump jumping word wording worded
phrase phrased phrasing query queries interesting interestingly curious curiously surprising surprisingly learn
learned learning learnt initial hunch ado user reply replies replied respond response instruction instruct instructed
handful scenario discuss discusses discussed discussing discussion scratch tally tallies tallied update updated
updating methodical methodically scene setting situation circumstance condition aware awareness recap recapitulate
deep deeper deeply dig digging delve delving dive diving broadly roughly approximately approximate merely solely
purely partly partially slightly somewhat highly extremely incredibly truly utterly altogether alike similarity
similarities relevance irrelevant importance significance significant significantly crucial essential critical vital
fundamental central primary secondary basic major minor common commonly typical typically normal normally usual
unusual regular regularly frequent frequently rare rarely occasional occasionally constant constantly eventual gradual
immediate immediately instant instantly sudden suddenly prompt promptly ready readily willing happy glad sorry afraid
worry worried trust trusted rely relying reliance hope hoping wish wishes wishing prefer preferred preferable suitable
suited appropriate appropriately proper properly adequate sufficient sufficiently insufficient valid validity validate
validated validating invalid plausible implausible feasible coherent coherence incoherent meaningful meaningless
useless pointless unhelpful productive effective effectively efficient efficiently ideal ideally optimal optimum
challenge challenging complex complexity complicated complicate tricky tough ease easier easiest simpler simplest
simplicity clarity clarify clarifies clarified clarifying ambiguous ambiguity vague vaguely unclear puzzle puzzled
puzzling confuse confused confusing confusion questionable questioned argue argument claim claimed premise statement
proposition opinion viewpoint standpoint angle insight intuition intuitive intuitively instinct guesswork gut theory
theoretical theoretically practice practical practically principle concept notion term framework model structure
structured structural organize organized organise organised arrange arranged arrangement categorize category
categories classify classified class classes criterion criteria standard constraint limit limited limitation restrict
restricted scope range extent degree level rate ratio percent percentage average maximum minimum max min increase
increased increasing decrease decreased decreasing reduce reduced reducing grow growing grew rise rising fall falling
drop dropped expand expanded extend extended refine refined refining improve improved improving enhance enhanced
adjust adjusted adjusting adjustment corrected correcting correction fix fixes fixed fixing resolve resolved resolving
resolution revise revised revising redo redone replace replaced replacing substitute swap swapped exchange switch
switched shift shifted convert converted transform transformed translate rephrase rephrased restate restated
paraphrase quote quoted cite cited source resource addresses addressed concern concerned concerning involve involved
involving engage engaged entail depend depending dependent independent independently relies contribute contributed
affect affected influence effect cause caused causing consequence impact implication accept accepted accepting
acceptable reject rejected rejecting deny denied agree agreed agreeing agreement disagree disagreement oppose opposed
opposing contrary contradict contradicted contradiction contradictory conflict conflicting compatible incompatible
align aligned alignment fit fitted fitting suit exclude excluded excluding exclusion omit omitted omitting skip
skipped skipping ignore ignored ignoring neglect neglected disregard dismiss dismissed discard discarded forget forgot
forgotten bring brought bringing send sent serve served run running ran play role act acting action perform performed
performing execute executed execution implement implemented operate operation activity effortless attempted aimed
intend intended seek seeking sought pursue pursued investigate investigated investigating investigation inquire
inquiry examination study studied studying research capture captured record recorded track tracked tracking trace
traced tracing monitor report reported log entry entries share shared sharing mutual joint join joined joining link
linked linking connect connected connecting associate associated association correlate attach attached split splitting
divide divided dividing division multiply multiplied subtract subtracted plus minus equation formula variable unknown
quicker brief briefly shortly concise concisely succinct length lengthy duration period today tomorrow yesterday
minute hour date year person reader writer author people human assistant machine ai hello hi hey dear sir madam
welcome kindly sincerely stand standing stood sit lies laying happened happening occur occurred occurring occurrence
arise arose emerge emerged success successful successfully succeed fail failed failing failure test tested testing
trial experiment proven proving demonstrate demonstrated demonstration illustrate illustration exemplify sample guide
guided guidance hint hinted tip advice suggestion recommend recommended recommendation pattern trend tendency tend
default actual real reality realistic virtually literal literally figurative abstract concrete middle finale finishing
start-to-finish onward forward backward double triple single multiple varied vary varies varying variety diverse
diversity alone lone sole albeit notwithstanding regardless nonetheless nevertheless whereby wherein thereof therein
thereby hereby herein henceforth whilst amid self own owned respective crosscheck crosschecked cross-check
sanity-check double-checked double-checking re-examine re-evaluate reexamine reevaluate reassess chunk fraction loop
iterate iteration cycle passes round draft outline sketch scheme deliver delivered delivery output input genuine
genuinely pure mere sheer utter anyhow somehow someway aside quest journey adventure tired boring bored excited
exciting fun funny amazing awesome wonderful excellent perfect perfectly fantastic brilliant neat cool strong stronger
strongest strongly weak weaker weakly firm firmly solid solidly robust glance glimpse peek hop sweep sweeping swept
story picture-perfect
"""
_CHINESE = frozenset(
    "的了在是有我你您他她它们这那此该个些一二三四五六七八九十百千两几第每各某另其之于与和及或而且但若如果则因为所以由从到向对把被让使得"
    "地着过吗呢吧啊呀嘛就也都还又再只才很更最太非常不没无未否可以能够会应该需要必须想知道认识理解思考考虑分析判断推断确定确认检查核对验证"
    "首先然后接着接下来最后总之因此于是综上结论答案问题题目选项选择正确错误步骤计算数量多少大小方法过程结果情况内容信息细节部分整体全"
    "求什么述遍步继续么呀已经请让咱们清晰仍另外此外其实显然当然确实实际总共一共"
    "看见观察注意仔细清楚明显显示展示所示图像片照画面张幅屏幕界面中里内外上下左右前后间旁边角处位置区域坐标框点标注名称物体东西对象目"
    "来去回开始继续进行完成现已经正将要说问告诉表示根据按照通过关于以及等等同样不同相比较像似乎好可能定当前今时候"
)


def _forms(text: str) -> frozenset[str]:
    return frozenset(_stem(word) for word in text.split())


def _stem(word: str) -> str:
    """A word without the -s of the plural or the third person."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


_STOCK = _forms(_GRAMMAR) | _forms(_REASONING) | _forms(" ".join((*IMAGE_WORDS, *LOOKING_WORDS, *PLACE_WORDS)))

_CJK = "\u3400-\u4dbf\u4e00-\u9fff"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:['\u2019-][^\W_{_CJK}]+)*")
_VOWEL = re.compile("[aeiouy]|[^\x00-\x7f]")
_NOISE = re.compile(r"[0-9]|(.)\1\1|[bcdfghjklmnpqrstvwxz]{5}|.{21}")


def visible(text: str) -> str:
    """A text without width variants and invisible characters."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")


def words(text: str) -> Iterator[str]:
    """Words of a text in lower case, Chinese characters one by one, numbers and invisible characters left out."""
    for match in _TOKEN.finditer(visible(text).casefold()):
        if not match[0].isdigit():
            yield match[0]


def is_character(word: str) -> bool:
    """Whether a word of `words` is a Chinese character."""
    return len(word) == 1 and "\u3400" <= word <= "\u9fff"


def word_key(word: str) -> str:
    """What is the same word: without the -s at its end."""
    return _stem(word)


def describes(word: str, of_the_question: Collection[str] = ()) -> bool:
    """Whether a word of `words` describes something. `of_the_question` are keys of words."""
    if is_character(word):
        return word not in _CHINESE and word not in of_the_question
    key = _stem(word)
    if len(word) < 3 or key in _STOCK or key in of_the_question:
        return False
    return bool(_VOWEL.search(word)) and not _NOISE.search(word)


def amount(text: str) -> int:
    """Amount of prose: characters of its words, and one for the space after each. Separators and numbers are none."""
    return sum(len(word) + 1 for word in words(text) if _is_word(word))


def _is_word(word: str) -> bool:
    real = len(word) > 1 and _VOWEL.search(word) and not _NOISE.search(word)
    return is_character(word) or bool(real) or word in ("a", "i")
