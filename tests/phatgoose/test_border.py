"""Compare the border between prompt and answer with lm-evaluation-harness's own language model.

Four kinds of tokenizer: byte-level BPE, the same with a start token, Unigram for a decoder, and
Unigram for T5.
"""

import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from harness.tasks import TaskSpec
from harness.tasks.sources.bigbench import read_archive
from phatgoose.base import Base, load_base
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError
from phatgoose.inference.generation import generate
from phatgoose.inference.scoring import score
from phatgoose.question import Question
from phatgoose.tokenization import encode_context, encode_pair
from tests.support.plain import plain_generate, plain_score
from tests.support.tiny import llama_tokenizer, t5_tokenizer, with_tokenizer

# The user's cache, looked up on import because tests have a separate one.
ARCHIVE = cache_dir() / "downloads" / "bigbench-1.0.0.tar.gz"
PACKAGED = cache_dir() / "bases" / "smollm2-135m"
TASKS = [
    "arithmetic/2_digit_addition",
    "code_line_description",
    "cause_and_effect/two_sentences",
    "date_understanding",
    "emoji_movie",
    "kanji_ascii/kanji_ascii_meaning",
    "logical_deduction/three_objects",
    "operators",
    "periodic_elements/subtask_0",
    "strategyqa",
    "unit_interpretation/lv0",
    "word_sorting",
]
KINDS = ["bpe", "start", "unigram", "t5"]
PAIRS = 300
Pair = tuple[str, str]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Base:
    """Return a base with each kind of tokenizer."""
    if request.param == "t5":
        loaded: Base = request.getfixturevalue("t5")
        return loaded
    llama: Base = request.getfixturevalue("llama")
    if request.param == "bpe":
        return llama
    tokenizer = llama_tokenizer(start=True) if request.param == "start" else t5_tokenizer(end=False)
    tokenizer.pad_token = tokenizer.eos_token
    return with_tokenizer(llama, tokenizer)


def hflm(base: Base) -> HFLM:
    # Its cache confuses the logits of two requests whose equal texts have different borders.
    return HFLM(
        pretrained=base.model,
        tokenizer=base.tokenizer,
        batch_size=1,
        device="cpu",
        logits_cache=False,
    )


def loglikelihoods(lm: HFLM, pairs: list[Pair]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found: list[tuple[float, bool]] = lm.loglikelihood(requests, disable_tqdm=True)
    return found


def invented() -> list[Pair]:
    """Return pairs in the style of BIG-bench: with a space, a newline or nothing at the border."""
    pairs = []
    for name in ("goose", "swan", "lake", "zebra crossing", "été"):
        for deed in ("flies", "is deep", "swims!", "has 12 legs"):
            question = f"Q: Is it true that the {name} {deed}?"
            for context, choices in (
                (f"{question}\n  choice: yes\n  choice: no\nA: ", ("yes", "no")),
                (f"{question}\nAnswer:", (" yes", " it is not.")),
                (f"{question} = ", ("3", "-12.5")),
                (f"{question}\n", ("grey", "two lakes")),
                (f"{question}\n\nA:\n\n", ("(A)", "\n")),
            ):
                pairs += [(context, choice) for choice in choices]
    return pairs


@pytest.fixture(scope="module")
def of_bigbench() -> list[Pair]:
    """Return pairs of the real BIG-bench, always the same ones."""
    if not ARCHIVE.exists():
        pytest.skip("the archive of BIG-bench is not in the cache")
    pairs = []
    for task in read_archive(
        ARCHIVE, [TaskSpec(name.partition("/")[0], (name,)) for name in TASKS]
    ):
        for number, (_, record) in enumerate(task.records):
            if number < 100 and len(record.input) < 400:
                pairs += [(record.input, c) for c in record.choices or record.targets]
    return random.Random(0).sample(pairs, PAIRS)


def mutate(base: Base, pair: Pair, draw: random.Random) -> Pair:
    """Move, add or remove something at the border."""
    context, target = pair
    special = draw.choice([base.tokenizer.eos_token, base.tokenizer.all_special_tokens[0]])
    middle = draw.randrange(1, 4)
    mutants = [
        (context.rstrip() + target[:middle], target[middle:]),  # inside a word
        (context[:-middle], context[-middle:] + target),
        (context.rstrip(), target.lstrip()),
        (context + draw.choice([" ", "  ", "\n", "\t", " \n "]), target),
        (context + draw.choice(["", "\n"]) + special, draw.choice(["", " "]) + target),
        (context + special + draw.choice([" ", "\n"]), target),
        (context, special + target),
        (context, target) if base.is_encoder_decoder else (special + context, target),
        (context, target + special),
        ("", target),
    ]
    context, target = draw.choice(mutants)
    return context, target or "a"


def follows(base: Base, lm: HFLM, pair: Pair) -> bool:
    """Return whether the whole's ids begin with those of the context, as encoded by lm-eval."""
    context, target = pair
    bare = context.rstrip()
    if base.is_encoder_decoder or not context:
        return True
    if not bare:
        return False  # lm-eval cannot score it
    whole, start = lm.tok_encode(context + target), lm.tok_encode(bare)
    return bool(whole[: len(start)] == start and len(whole) > len(start))


def check(base: Base, pairs: list[Pair]) -> tuple[int, int]:
    """Compare all pairs with lm-eval, or with the rule where lm-eval's method loses a token."""
    lm = hflm(base)  # before anything is scored, because it ties the weights of every T5
    alike = [pair for pair in pairs if follows(base, lm, pair)]
    others = [pair for pair in pairs if not follows(base, lm, pair)]
    scores = [
        found
        for start in range(0, len(pairs), 50)
        for found in score(
            base, [Question.encode(base, c, [t]) for c, t in (alike + others)[start : start + 50]]
        )
    ]
    expected = loglikelihoods(lm, alike)
    for pair, (found,), (value, greedy) in zip(alike, scores, expected, strict=False):
        assert found.loglikelihood == pytest.approx(value, abs=1e-4), pair
        assert found.is_greedy == greedy, pair
    eos = base.tokenizer.eos_token_id
    for (context, target), (found,) in zip(others, scores[len(alike) :], strict=True):
        bare = context.rstrip()
        moved = context[len(bare) :] + target
        ids = encode_pair(base, context, target)
        if bare:
            own = base.tokenizer(moved, add_special_tokens=False)["input_ids"]
            assert ids == (encode_context(base, bare), [*own, eos])
        expected_score = plain_score(base, *ids)
        assert found.loglikelihood == pytest.approx(expected_score.loglikelihood, abs=1e-4)
        assert found.tokens > 0
    return len(alike), len(others)


def test_invented_pairs_score_as_in_lm_eval(kind: Base) -> None:
    alike, others = check(kind, invented())
    assert alike == 200
    assert others == 0


def test_mutants_of_invented_pairs_score_as_in_lm_eval_or_by_the_rule(kind: Base) -> None:
    draw = random.Random(1)
    alike, others = check(kind, [mutate(kind, pair, draw) for pair in invented() * 2][:PAIRS])
    assert alike > PAIRS / 2
    assert others > 2 or kind.is_encoder_decoder


def test_pairs_of_bigbench_score_as_in_lm_eval(kind: Base, of_bigbench: list[Pair]) -> None:
    alike, _ = check(kind, of_bigbench)
    assert alike > 0.9 * PAIRS


def test_mutants_of_bigbench_score_as_in_lm_eval_or_by_the_rule(
    kind: Base, of_bigbench: list[Pair]
) -> None:
    draw = random.Random(2)
    alike, others = check(kind, [mutate(kind, pair, draw) for pair in of_bigbench])
    assert alike > PAIRS / 2
    assert others > 2 or kind.is_encoder_decoder


@pytest.fixture
def smollm2() -> Base:
    if not PACKAGED.exists():
        pytest.skip("the packaged base is not in the cache")
    return load_base(str(PACKAGED))


@pytest.mark.parametrize(
    ("context", "target"),
    [("hello wor", "ld"), ("I like https:", "//"), ("a.", "."), ("un", "der")],
)
def test_a_target_merged_into_the_prompt_is_encoded_on_its_own(
    smollm2: Base, context: str, target: str
) -> None:
    tokenizer = smollm2.tokenizer
    ids = encode_pair(smollm2, context, target)
    assert ids == (tokenizer.encode(context), [*tokenizer.encode(target), tokenizer.eos_token_id])
    question = Question.encode(smollm2, context, [target, " else"])
    assert score(smollm2, [question])[0][0].loglikelihood < -1.0


def test_an_end_token_in_a_prompt_stays_there(smollm2: Base) -> None:
    prompt = "<|im_start|>user\nName a colour.<|im_end|>"
    contexts = [prompt, f"{prompt}\n"]
    questions = [Question.encode(smollm2, context, ["Red"]) for context in contexts]
    scores = [found.loglikelihood for (found,) in score(smollm2, questions)]
    assert scores == pytest.approx([-22.900, -15.274], abs=1e-3)
    lm = hflm(smollm2)
    expected = loglikelihoods(lm, [(context, "Red") for context in contexts])
    assert scores == pytest.approx([value for value, _ in expected], abs=1e-4)
    end = smollm2.tokenizer.eos_token_id
    ids = [encode_context(smollm2, context) for context in contexts]
    assert [of[7:] for of in ids] == [[end], [end, *smollm2.tokenizer.encode("\n")]]
    options = {"until": [], "max_gen_toks": 4}
    requests = [Instance("generate_until", {}, (context, options), 0) for context in contexts]
    written = lm.generate_until(requests, disable_tqdm=True)
    assert generate(smollm2, ids, 4) == written
    assert all(text.strip() for text in written)


@pytest.mark.parametrize("context", ["", "  ", "<s>", "the lake", "<s>the lake", " <s> the"])
@pytest.mark.parametrize("target", [" is deep", "<s> is deep"])
def test_the_start_token_is_added_once(llama: Base, context: str, target: str) -> None:
    base = with_tokenizer(llama, llama_tokenizer(start=True))
    start = base.tokenizer.bos_token_id
    context_ids, target_ids = encode_pair(base, context, target)
    assert context_ids[0] == start
    assert encode_context(base, context)[0] == start
    written = (context + target).count("<s>")
    ids = context_ids + target_ids
    begins = (context.lstrip() or target.lstrip()).startswith("<s>") and context[:1] != " "
    assert ids.count(start) == written + (not begins)


def texts(base: Base) -> tuple[str, list[str]]:
    context = "the grey goose flies over the lake, and the swan swims. " * 12
    return context + "Is the lake deep?", [" yes", " it is not dry", " and the goose flies"]


@pytest.mark.parametrize("length", [20, 33, 64])
def test_long_sequences_are_truncated_as_in_lm_eval(kind: Base, length: int) -> None:
    """Check equality except for the start token, which lm-eval drops."""
    kind.model.config.n_positions = length
    lm = hflm(kind)
    assert lm.max_length == length
    context, choices = texts(kind)
    question = Question.encode(kind, context, choices)
    assert question.is_cut(kind)
    (scores,) = score(kind, [question])
    if kind.tokenizer.bos_token == "<s>":
        for target, found in zip(question.choices, scores, strict=True):
            kept = length + 1 - (len(target) - 1)
            cut = [kind.tokenizer.bos_token_id, *question.context[1 - kept :]]
            expected = plain_score(kind, cut, target)
            assert found.loglikelihood == pytest.approx(expected.loglikelihood, abs=1e-4)
            assert found.is_greedy == expected.is_greedy
    else:
        known = loglikelihoods(lm, [(context, choice) for choice in choices])
        assert [s.loglikelihood for s in scores] == pytest.approx([v for v, _ in known], abs=1e-4)
        assert [s.is_greedy for s in scores] == [greedy for _, greedy in known]
    for target, found in zip(question.choices, scores, strict=True):
        assert found.tokens == len(target) - 1


def test_the_end_of_a_full_row_is_scored_within_the_positions(llama: Base) -> None:
    """Check a row truncated by one more token for the end; a row with room for it is complete."""
    longest = 0

    def measure(_: object, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        nonlocal longest
        longest = max(longest, int(kwargs["position_ids"].max()) + 1)

    handle = llama.model.register_forward_pre_hook(measure, with_kwargs=True)
    context, choices = texts(llama)
    question = Question.encode(llama, context, choices)
    llama.model.config.max_position_embeddings = 40
    (scores,) = score(llama, [question])
    handle.remove()
    assert longest == 40
    for target, found in zip(question.choices, scores, strict=True):
        row = [*question.context, *target[:-1]][-40:]
        expected = plain_score(llama, row, target[-1:])
        assert found.eos_loglikelihood == pytest.approx(expected.eos_loglikelihood, abs=1e-4)
        assert found.ends_greedy == expected.ends_greedy
    end = llama.tokenizer.eos_token_id
    greedy = plain_generate(llama, question.context[-(41 - 3) :], 3)
    assert end not in greedy
    ((found,),) = score(llama, [Question(question.context, [[*greedy, end]])])
    assert found.is_greedy
    assert not found.ends_greedy
    (target,) = question.choices[:1]
    llama.model.config.max_position_embeddings = len(question.context) + len(target) - 1
    one = Question(question.context, [target])
    assert one.parts(llama) == [one]
    llama.model.config.max_position_embeddings -= 1
    assert len(one.parts(llama)) == 2
    assert not one.is_cut(llama)  # only the end needs one more position
    llama.model.config.max_position_embeddings -= 1
    assert one.is_cut(llama)


def test_generation_prompts_are_truncated_as_in_lm_eval(kind: Base) -> None:
    kind.model.config.n_positions = 30
    context, _ = texts(kind)
    room = 30 if kind.is_encoder_decoder else 23
    ids = encode_context(kind, context)
    if kind.tokenizer.bos_token == "<s>":
        whole = generate(kind, [[ids[0], *ids[1 - room :]]], 7)
    else:
        lm = hflm(kind)
        options = {"until": [], "max_gen_toks": 7, "max_length": 8}
        if not kind.is_encoder_decoder:  # lm-eval adds it to the length of an encoder
            del options["max_length"]
        request = Instance("generate_until", {}, (context, options), 0)
        whole = lm.generate_until([request], disable_tqdm=True)
    assert generate(kind, [ids], 7) == whole
    assert whole != [""] or len(kind.tokenizer) < 100  # most ids of that base are not words of it


def test_the_longest_choice_limits_the_context_of_an_example(llama: Base) -> None:
    """Check that choices share one context under a recipe's lengths, as in an expert's profile."""
    llama.model.config.max_position_embeddings = 40
    context, choices = texts(llama)
    question = Question.encode(llama, context, choices, 10**6, 10**6)
    longest = max(len(choice) for choice in question.choices)
    assert len(question.choices[0]) < longest
    assert question.context == encode_context(llama, context)[-(40 - longest + 1) :]
    assert question.parts(llama) == [question]


def test_encoder_inputs_are_truncated_to_their_maximum_length(t5: Base) -> None:
    question = Question.encode(t5, "the grey goose flies over the lake", [" yes"])
    t5.model.config.n_positions = len(question.context)
    assert not question.is_cut(t5)
    assert question.parts(t5) == [question]
    t5.model.config.n_positions -= 1
    assert question.is_cut(t5)
    assert question.parts(t5)[0].context == question.context[1:]


def test_a_choice_longer_than_the_base_is_refused(kind: Base) -> None:
    question = Question.encode(kind, "the", [" lake" * 20])
    kind.model.config.n_positions = len(question.choices[0]) - 1
    score(kind, [question])
    kind.model.config.n_positions = 8
    with pytest.raises(PhatgooseError, match="reads 8 at most"):
        score(kind, [question])


def test_generating_zero_tokens_or_without_room_is_refused(llama: Base) -> None:
    for count in (0, -1, 512, 600):
        with pytest.raises(PhatgooseError, match=f"max_new_tokens={count}: .* reads 512 tokens"):
            generate(llama, [[1]], count)


def test_a_target_without_tokens_is_refused(kind: Base) -> None:
    for context in ("the lake", ""):
        with pytest.raises(PhatgooseError, match=r"target='': .* makes no token of it"):
            encode_pair(kind, context, "")
