"""Each adapter makes of its data set's rows, in their real schema, what a person would read from them."""

from collections import Counter

import pytest
from PIL import Image

from qwen3f.data.chat.template import thinking_mode
from qwen3f.data.sources.adapters import dpo, grpo, multimodal, pretrain, sft
from qwen3f.data.sources.adapters.opening import rows
from qwen3f.data.sources.adapters.registry import DATASETS, find, names, parse_mixture
from qwen3f.data.sources.adapters.rows import LeftOut, Row, RowFault
from qwen3f.errors import UserError
from tests.data.sources.adapters.real_rows import ROWS, write

FORMATS = ["x.parquet", "x.jsonl"]


def _user(text):
    return {"role": "user", "content": text}


def _answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def _through(name, adapter, tmp_path, file):
    """What the adapter makes of the data set's rows, and what it left out."""
    write(ROWS[name], tmp_path / file)
    made, left = [], Counter()
    for row in rows(f"{name}@{tmp_path}"):
        try:
            made.append(adapter(row))
        except LeftOut as reason:
            left[reason.reason] += 1
    return made, dict(left)


def test_every_data_set_has_rows_and_an_adapter():
    adapters = {*sft.ADAPTERS, *grpo.ADAPTERS, *multimodal.ADAPTERS, "ultrafeedback", *names("pretrain")}
    assert adapters == set(ROWS) == set(names())
    usual = [*pretrain.STAGES.values(), *sft.VARIANTS.values(), grpo.DEFAULT, dpo.DEFAULT, multimodal.DEFAULT]
    assert sorted(",".join(usual).split(",")) == sorted(names())
    for dataset in DATASETS:
        assert set(dataset.columns) | set(dataset.optional) <= set(ROWS[dataset.name][0])


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("name", names("pretrain"))
def test_documents(name, file, tmp_path):
    made, left = _through(name, pretrain.document, tmp_path, file)
    assert [document.text for document in made] == [row["text"] for row in ROWS[name]]
    assert [document.name for document in made] == [f"{tmp_path / file}:{n + 1}" for n in range(len(made))]
    assert not left


@pytest.mark.parametrize("file", FORMATS)
def test_cold_start(file, tmp_path):
    made, left = _through("openmathinstruct-2", sft.openmathinstruct_2, tmp_path / "o", file)
    assert made == [
        [
            _user("What is $2 + 3$?"),
            _answer(
                r"The final answer is $\boxed{5}$.", reasoning_content="Adding gives $2 + 3 = 5$.\n\nSo $\\boxed{5}$."
            ),
        ],
        [
            _user("Halve 1."),
            _answer(r"The final answer is $\boxed{\frac{1}{2}}$.", reasoning_content=r"$\boxed{\frac{1}{2}}$"),
        ],
    ]
    assert not left
    made, left = _through("numinamath-cot", sft.numinamath_cot, tmp_path / "n", file)
    assert [chat[1]["content"] for chat in made] == [
        r"The final answer is $\boxed{\{2\}}$.",
        r"The final answer is $\boxed{8}$.",
    ]
    assert made[0][1]["reasoning_content"] == ROWS["numinamath-cot"][0]["solution"]
    assert left == {"no_answer": 1}


@pytest.mark.parametrize("file", FORMATS)
def test_fusion(file, tmp_path):
    made, left = _through("ultrachat", sft.ultrachat, tmp_path / "u", file)
    assert made == [
        [_user("Hi there"), _answer("Hello!"), _user("And the weather? /no_think"), _answer("Sunny.\nWarm.")],
        [_user("Bye /no_think"), _answer("the end")],
    ]
    assert not left
    assert not thinking_mode(made[0])
    made, left = _through("openhermes-2.5", sft.openhermes_2_5, tmp_path / "h", file)
    assert made == [
        [_user("Name a bird. /no_think"), _answer("A robin.")],
        [
            {"role": "system", "content": "Be brief."},
            _user("Why?"),
            _answer("So."),
            _user("Really? /no_think"),
            _answer("Yes."),
        ],
        [{"role": "system", "content": "You are Ann."}, _user("Who? /no_think"), _answer("Me.")],
        [_user("One? /no_think"), _answer("1")],
    ]
    assert left == {"unanswered": 1}


@pytest.mark.parametrize("file", FORMATS)
def test_queries(file, tmp_path):
    made, left = _through("gsm8k", grpo.gsm8k, tmp_path / "g", file)
    assert made == [{"question": "Two and two?", "answer": "4"}, {"question": "A lot?", "answer": "1234000"}]
    assert not left
    made, left = _through("math", grpo.math, tmp_path / "m", file)
    assert made == [{"question": "Find $x$.", "answer": r"\frac{1}{\sqrt{2}}"}]
    assert left == {"no_answer": 1}


def test_mirrors_of_math_have_its_columns(tmp_path):
    row = {"problem": "P", "solution": r"\boxed{3}", "answer": "3", "subject": "Algebra", "level": 2, "unique_id": "a"}
    write([row], tmp_path / "x.jsonl")
    for mirror in ("HuggingFaceH4/MATH-500", "DigitalLearningGmbH/MATH-lighteval"):
        assert find(mirror).hub_id == mirror
        (found,) = rows(f"{mirror}@{tmp_path}")
        assert grpo.math(found) == {"question": "P", "answer": "3"}


@pytest.mark.parametrize("file", FORMATS)
def test_preferences(file, tmp_path):
    made, left = _through("ultrafeedback", dpo.ultrafeedback, tmp_path, file)
    assert made == [
        dpo.Preference((_user("Say hi."),), "Hi!", "Go away.", (4.75, 1.75)),
        dpo.Preference((_user("Two?"),), "2", "No.", (2.0, 1.0)),
    ]
    assert left == {"ties": 1, "unrated": 1}


@pytest.fixture
def pictures(tmp_path):
    """An image folder with the two images of the LLaVA rows, and one beside it."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGBA", (3, 2), (255, 0, 0, 255)).save(folder / "000000033471.png")
    Image.new("L", (2, 2), 7).save(folder / "deep" / "2.png")
    Image.new("L", (2, 2), 7).save(tmp_path / "secret.png")
    return folder


@pytest.mark.parametrize("file", [*FORMATS, "llava_instruct_150k.json"])
def test_images(file, tmp_path, pictures):
    made, left = _through("llava-instruct-150k", lambda row: multimodal.llava(row, pictures), tmp_path / "data", file)
    assert [list(chat.messages) for chat in made] == [
        [_user("<image>\nWhat colour is it?"), _answer("Red."), _user("Sure?"), _answer("Yes.")],
        [_user("Describe.\n<image>"), _answer("Blue.")],
    ]
    assert not left
    first = made[0].image.open()
    assert (first.mode, first.size, first.getpixel((2, 1))) == ("RGB", (3, 2), (255, 0, 0))
    assert made[1].image.open().getpixel((0, 0)) == (7, 7, 7)
    made[1].image.path.write_bytes(b"no image")  # open() reads the file at each call, not before
    with pytest.raises(UserError, match=rf"{file}:2: the image .*2.png cannot be read: it is no whole file of JPEG"):
        made[1].image.open()


def _llava(image="000000033471.png", text="<image> Q"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}]
    return Row({"image": image, "conversations": turns}, "f.json:7")


@pytest.mark.parametrize(
    "row, message",
    [
        (_llava("gone.jpg"), r"f.json:7 names the image 'gone.jpg', which is not in .*images"),
        (_llava("deep"), "which is not in"),
        (_llava("../secret.png"), r"f.json:7 names the image '../secret.png', outside the folder"),
        (_llava("deep/../../secret.png"), "outside the folder"),
        (_llava("link.png"), "outside the folder"),
        (_llava("/etc/hostname"), "outside the folder"),
        (_llava(None), "f.json:7 has null under 'image'"),
        (_llava(text="no picture"), "f.json:7 holds 0 of <image>"),
        (_llava(text="<image><image>"), "f.json:7 holds 2 of <image>"),
    ],
)
def test_images_at_fault(row, message, tmp_path, pictures):
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(RowFault, match=message):
        multimodal.llava(row, pictures)


def _set(name, index=0, **values):
    return Row({**ROWS[name][index], **values}, "f.jsonl:3")


@pytest.mark.parametrize(
    "adapter, row, message",
    [
        (pretrain.document, _set("pg19", text=None), "f.jsonl:3 has null under 'text'"),
        (pretrain.document, _set("pg19", text=5), "f.jsonl:3 has a int under 'text': write a string"),
        (pretrain.document, _set("pg19", text="a\ud800"), r"holds the lone surrogate U\+D800 under 'text'"),
        (sft.openmathinstruct_2, _set("openmathinstruct-2", expected_answer=None), "null under 'expected_answer'"),
        (sft.numinamath_cot, _set("numinamath-cot", solution="  "), "an empty text under 'solution'"),
        (sft.ultrachat, _set("ultrachat", messages=None), "f.jsonl:3 has null under 'messages'"),
        (sft.ultrachat, _set("ultrachat", messages=[]), "an empty list under 'messages'"),
        (sft.ultrachat, _set("ultrachat", messages="x"), "holds no list of records under 'messages'"),
        (
            sft.ultrachat,
            _set("ultrachat", messages=[_user("a"), {"role": "bot", "content": "b"}]),
            "f.jsonl:3, turn 2 of 'messages', has role='bot': write one of system, user, assistant",
        ),
        (
            sft.ultrachat,
            _set("ultrachat", messages=[{"role": ["user"], "content": "b"}]),
            r"f.jsonl:3, turn 1 of 'messages', has role=\['user'\]: write one of",
        ),
        (sft.ultrachat, _set("ultrachat", messages=[_user(None)]), "turn 1 of 'messages', has null under 'content'"),
        (
            sft.openhermes_2_5,
            _set("openhermes-2.5", conversations=[{"from": "human", "value": ""}]),
            "turn 1 of 'conversations', has an empty text under 'value'",
        ),
        (grpo.gsm8k, _set("gsm8k", question=""), "an empty text under 'question'"),
        (grpo.math, _set("math", solution=None), "null under 'solution'"),
        (
            dpo.ultrafeedback,
            _set("ultrafeedback", completions=[{"response": "a"}]),
            "completion 1, has no record under",
        ),
        (
            dpo.ultrafeedback,
            _set("ultrafeedback", completions=[{"response": "a", "annotations": {"honesty": {"Rating": "9"}}}]),
            "completion 1, has the honesty Rating '9': write '1' to '5'",
        ),
        (
            dpo.ultrafeedback,
            _set("ultrafeedback", completions=[{"response": "a", "annotations": {"honesty": {"Rating": 10**400}}}]),
            "completion 1, has the honesty Rating 1000",
        ),
        (
            dpo.ultrafeedback,
            _set("ultrafeedback", completions=[{"response": None, "annotations": {}}]),
            "completion 1, has null under 'response'",
        ),
    ],
)
def test_rows_at_fault(adapter, row, message):
    with pytest.raises(RowFault, match=message):
        adapter(row)


def test_empty_text_is_left_out():
    with pytest.raises(LeftOut, match="empty_texts"):
        pretrain.document(_set("pg19", text=""))


@pytest.mark.parametrize(
    "mixture, use, message",
    [
        ("gsm9k", "", "Unknown data set 'gsm9k': did you mean 'gsm8k'?"),
        ("openai/gsm8", "grpo", "did you mean 'openai/gsm8k'?"),
        ("xyzzy", "grpo", "Unknown data set 'xyzzy': write one of gsm8k, math"),
        ("gsm8k", "sft", "'gsm8k' is for grpo, not sft: write one of openmathinstruct-2, numinamath-cot"),
        ("EleutherAI/proof-pile-2", "", "several parts: write one of proof-pile-2-arxiv, proof-pile-2-algebraic-stack"),
        ("gsm8k,gsm8k@x", "", "must name one or more different"),
        ("", "dpo", "must name one or more different data sets: ultrafeedback"),
        ("gsm8k=0", "", "'gsm8k=0' has the weight '0': write a positive number"),
        ("gsm8k=half", "", "has the weight 'half'"),
        ("gsm8k@", "", "names no directory after the @"),
    ],
)
def test_mixtures_at_fault(mixture, use, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse_mixture(mixture, use=use)


def test_mixture():
    parts = parse_mixture("HuggingFaceFW/fineweb=0.7, slimpajama@/a=b=0.3", root="/data")
    assert [(p.dataset.name, p.root, p.weight) for p in parts] == [
        ("fineweb", "/data/fineweb", 0.7),
        ("slimpajama", "/a=b", 0.3),
    ]
    assert parse_mixture("pg19", root="/data")[0].root == "/data"
    assert parse_mixture("pg19")[0].root == ""
