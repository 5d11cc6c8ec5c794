"""Which requests share a key, and the order of replicas, compared with plain statements of the required order."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from deployments.affinity import affinity_key, by_preference, ranked
from llava_core.types import (
    AnyRequest,
    CompletionRequest,
    GenerationRequest,
    ImagePart,
    ImageUrl,
    Message,
    SamplingParams,
    TextPart,
)

REPLICAS = [f"replica-{index}" for index in range(8)]
KEYS = [f"key-{index}" for index in range(4000)]

names = st.sets(st.text(min_size=1), min_size=1, max_size=12)


def _conversation(*messages: Message, system: str | None = None) -> GenerationRequest:
    return GenerationRequest("id", messages, SamplingParams(), system)


def _user(*parts: TextPart | ImagePart | ImageUrl) -> Message:
    return Message("user", parts)


def _are_together(*requests: AnyRequest) -> bool:
    return len({affinity_key(request) for request in requests}) == 1


def test_questions_about_a_picture_are_together_whatever_is_asked_and_in_whichever_turn() -> None:
    picture, other = ImagePart(b"picture"), ImagePart(b"other")
    first = _conversation(_user(picture, TextPart("What?")))
    later = _conversation(
        *_conversation(_user(TextPart("Hi"))).messages, Message("assistant", (TextPart("Yes?"),)), _user(picture, other)
    )
    assert _are_together(first, later, _conversation(_user(TextPart("Where?"), picture), system="Be brief."))
    assert not _are_together(first, _conversation(_user(other, TextPart("What?"))))


def test_a_picture_by_address_is_known_by_that() -> None:
    here, there = (_conversation(_user(ImageUrl(f"https://{host}/a.png"))) for host in ("here.org", "there.org"))
    assert _are_together(here, _conversation(_user(ImageUrl("https://here.org/a.png"), TextPart("What?"))))
    assert not _are_together(here, there)


def test_large_pictures_are_told_apart_by_what_lies_between_equal_borders() -> None:
    border = bytes(1_000_000)
    pictures = [border + bytes([shade]) * 50_000 + border for shade in range(3)]
    requests = [_conversation(_user(ImagePart(picture))) for picture in pictures]
    assert len({affinity_key(request) for request in requests}) == 3
    assert not _are_together(requests[0], _conversation(_user(ImagePart(pictures[0] + b"\0"))))


def test_turns_of_a_conversation_are_together_and_a_system_text_alone_is_not_enough() -> None:
    question, system = _user(TextPart("What is a radiograph?")), "You are a radiologist. " * 200
    first = _conversation(question, system=system)
    second = _conversation(question, Message("assistant", (TextPart("A picture."),)), _user(TextPart("Of what?")))
    assert _are_together(first, _conversation(*second.messages, system=system))
    assert not _are_together(first, second)
    assert not _are_together(first, _conversation(_user(TextPart("What is a bone?")), system=system))


def test_only_the_beginning_of_a_long_text_counts() -> None:
    document = "Once upon a time " * 100
    assert _are_together(*(_conversation(_user(TextPart(document + question))) for question in ("Who?", "When?")))
    texts = [CompletionRequest("id", document + end, SamplingParams()) for end in ("there", "here")]
    ids = [CompletionRequest("id", (*range(2000), end), SamplingParams()) for end in (1, 2)]
    assert _are_together(*texts)
    assert _are_together(*ids)
    assert not _are_together(texts[0], ids[0])


def test_half_a_character_has_a_key_too() -> None:
    assert affinity_key(_conversation(_user(TextPart("\ud83d")))) != affinity_key(_conversation(_user(TextPart("x"))))


@given(st.text(), names)
def test_every_replica_is_ranked_once_in_an_order_that_is_the_same_for_all(key: str, replicas: set[str]) -> None:
    order = ranked(key, replicas)
    assert sorted(order) == sorted(replicas)
    assert order == ranked(key, sorted(replicas, reverse=True))


@given(st.text(), names, st.text(min_size=1))
def test_a_replica_that_goes_leaves_the_others_in_their_order(key: str, replicas: set[str], gone: str) -> None:
    order = ranked(key, {*replicas, gone})
    assert [replica for replica in order if replica != gone] == ranked(key, replicas - {gone})


def test_a_replica_that_comes_takes_its_share_of_the_keys_and_moves_no_other() -> None:
    before = {key: ranked(key, REPLICAS[:-1])[0] for key in KEYS}
    after = {key: ranked(key, REPLICAS)[0] for key in KEYS}
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key] for key in moved} == {REPLICAS[-1]}
    # Binomial: 500 are expected, with a standard deviation of 21.
    assert 400 < len(moved) < 600


def test_every_replica_is_preferred_by_as_many_keys_and_ranked_second_as_often_behind_any_other() -> None:
    firsts = Counter(ranked(key, REPLICAS)[0] for key in KEYS)
    assert all(400 < firsts[replica] < 600 for replica in REPLICAS)
    seconds = Counter(tuple(ranked(key, REPLICAS)[:2]) for key in KEYS)
    # There are 56 pairs; 71 are expected for each, with a standard deviation of 8.
    assert len(seconds) == 56
    assert all(30 < count < 120 for count in seconds.values())


@given(st.text(), st.dictionaries(st.text(min_size=1), st.integers(0, 40), min_size=1, max_size=8))
def test_the_preferred_one_comes_first_unless_it_is_busy_and_then_one_that_has_less_than_its_share(
    key: str, loads: dict[str, int]
) -> None:
    share = (sum(loads.values()) + 1) / len(loads)
    preferred, *others = ranked(key, loads)
    calm = [replica for replica in others if loads[replica] < share]
    if loads[preferred] < max(2, 1.5 * share):
        calm.insert(0, preferred)
    assert calm, "there is always one"
    order = by_preference(key, loads)
    assert sorted(order) == sorted(loads)
    assert order[: len(calm)] == calm
    rest = [loads[replica] for replica in order[len(calm) :]]
    assert rest == sorted(rest)


@given(st.integers(2, 8), st.integers(1, 20))
def test_what_everybody_asks_about_keeps_every_replica_at_work(num_replicas: int, num_each: int) -> None:
    loads = dict.fromkeys(REPLICAS[:num_replicas], 0)
    for _ in range(num_replicas * num_each * 2):
        loads[by_preference("popular", loads)[0]] += 1
    assert min(loads.values()) >= num_each / 2


@given(st.lists(st.integers(0, 5), max_size=200), st.integers(1, 6))
def test_no_replica_gets_much_more_than_its_share_whatever_is_asked(keys: list[int], num_replicas: int) -> None:
    loads = dict.fromkeys(REPLICAS[:num_replicas], 0)
    for sent, key in enumerate(keys, 1):
        loads[by_preference(str(key), loads)[0]] += 1
        assert max(loads.values()) <= max(2, math.ceil(1.5 * sent / num_replicas))


def test_one_question_after_the_other_stays_where_it_is() -> None:
    for key in KEYS[:100]:
        preferred = ranked(key, REPLICAS)[0]
        # Even if its last answer has not quite ended yet.
        for load in (0, 1):
            assert by_preference(key, dict.fromkeys(REPLICAS, 0) | {preferred: load})[0] == preferred


@given(st.integers(1, 6), st.integers(1, 12))
def test_nobody_is_sent_where_there_is_no_room_while_there_is_some(num_replicas: int, capacity: int) -> None:
    loads = dict.fromkeys(REPLICAS[:num_replicas], 0)
    for _ in range(num_replicas * capacity):
        loads[by_preference("popular", loads, capacity=capacity)[0]] += 1
    assert set(loads.values()) == {capacity}
