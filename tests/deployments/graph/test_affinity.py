"""Which requests share a key, and the order of replicas, compared with plain statements of the required order."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from deployments.graph.affinity import affinity_key, by_preference, ranked
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


def _share_a_key(*requests: AnyRequest) -> bool:
    return len({affinity_key(request) for request in requests}) == 1


def test_requests_with_the_same_first_picture_share_a_key() -> None:
    picture, other = ImagePart(b"picture"), ImagePart(b"other")
    first = _conversation(_user(picture, TextPart("What?")))
    later = _conversation(
        *_conversation(_user(TextPart("Hi"))).messages, Message("assistant", (TextPart("Yes?"),)), _user(picture, other)
    )
    assert _share_a_key(first, later, _conversation(_user(TextPart("Where?"), picture), system="Be brief."))
    assert not _share_a_key(first, _conversation(_user(other, TextPart("What?"))))


def test_a_picture_given_by_url_is_identified_by_its_url() -> None:
    here, there = (_conversation(_user(ImageUrl(f"https://{host}/a.png"))) for host in ("here.org", "there.org"))
    assert _share_a_key(here, _conversation(_user(ImageUrl("https://here.org/a.png"), TextPart("What?"))))
    assert not _share_a_key(here, there)


def test_large_pictures_that_differ_only_in_the_middle_have_different_keys() -> None:
    border = bytes(1_000_000)
    pictures = [border + bytes([shade]) * 50_000 + border for shade in range(3)]
    requests = [_conversation(_user(ImagePart(picture))) for picture in pictures]
    assert len({affinity_key(request) for request in requests}) == 3
    assert not _share_a_key(requests[0], _conversation(_user(ImagePart(pictures[0] + b"\0"))))


def test_turns_of_a_conversation_share_a_key_unlike_equal_system_texts() -> None:
    question, system = _user(TextPart("What is a radiograph?")), "You are a radiologist. " * 200
    first = _conversation(question, system=system)
    second = _conversation(question, Message("assistant", (TextPart("A picture."),)), _user(TextPart("Of what?")))
    assert _share_a_key(first, _conversation(*second.messages, system=system))
    assert not _share_a_key(first, second)
    assert not _share_a_key(first, _conversation(_user(TextPart("What is a bone?")), system=system))


def test_only_the_beginning_of_a_long_prompt_determines_the_key() -> None:
    document = "Once upon a time " * 100
    assert _share_a_key(*(_conversation(_user(TextPart(document + question))) for question in ("Who?", "When?")))
    texts = [CompletionRequest("id", document + end, SamplingParams()) for end in ("there", "here")]
    ids = [CompletionRequest("id", (*range(2000), end), SamplingParams()) for end in (1, 2)]
    assert _share_a_key(*texts)
    assert _share_a_key(*ids)
    assert not _share_a_key(texts[0], ids[0])


def test_a_lone_surrogate_has_a_key() -> None:
    assert affinity_key(_conversation(_user(TextPart("\ud83d")))) != affinity_key(_conversation(_user(TextPart("x"))))


@given(st.text(), names)
def test_ranking_is_a_permutation_independent_of_the_input_order(key: str, replicas: set[str]) -> None:
    order = ranked(key, replicas)
    assert sorted(order) == sorted(replicas)
    assert order == ranked(key, sorted(replicas, reverse=True))


@given(st.text(), names, st.text(min_size=1))
def test_removing_a_replica_keeps_the_order_of_the_others(key: str, replicas: set[str], gone: str) -> None:
    order = ranked(key, {*replicas, gone})
    assert [replica for replica in order if replica != gone] == ranked(key, replicas - {gone})


def test_a_new_replica_takes_its_share_of_keys_and_moves_no_others() -> None:
    before = {key: ranked(key, REPLICAS[:-1])[0] for key in KEYS}
    after = {key: ranked(key, REPLICAS)[0] for key in KEYS}
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key] for key in moved} == {REPLICAS[-1]}
    # Binomial: 500 are expected, with a standard deviation of 21.
    assert 400 < len(moved) < 600


def test_first_and_second_ranks_are_spread_evenly_over_replicas() -> None:
    firsts = Counter(ranked(key, REPLICAS)[0] for key in KEYS)
    assert all(400 < firsts[replica] < 600 for replica in REPLICAS)
    seconds = Counter(tuple(ranked(key, REPLICAS)[:2]) for key in KEYS)
    # There are 56 pairs; 71 are expected for each, with a standard deviation of 8.
    assert len(seconds) == 56
    assert all(30 < count < 120 for count in seconds.values())


@given(st.text(), st.dictionaries(st.text(min_size=1), st.integers(0, 40), min_size=1, max_size=8))
def test_a_busy_preferred_replica_yields_to_replicas_below_their_share(key: str, loads: dict[str, int]) -> None:
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
def test_a_popular_key_keeps_every_replica_busy(num_replicas: int, num_each: int) -> None:
    loads = dict.fromkeys(REPLICAS[:num_replicas], 0)
    for _ in range(num_replicas * num_each * 2):
        loads[by_preference("popular", loads)[0]] += 1
    assert min(loads.values()) >= num_each / 2


@given(st.lists(st.integers(0, 5), max_size=200), st.integers(1, 6))
def test_no_replica_gets_much_more_than_its_share_of_any_keys(keys: list[int], num_replicas: int) -> None:
    loads = dict.fromkeys(REPLICAS[:num_replicas], 0)
    for sent, key in enumerate(keys, 1):
        loads[by_preference(str(key), loads)[0]] += 1
        assert max(loads.values()) <= max(2, math.ceil(1.5 * sent / num_replicas))


def test_sequential_questions_stay_on_the_preferred_replica() -> None:
    for key in KEYS[:100]:
        preferred = ranked(key, REPLICAS)[0]
        # Even if its last answer has not quite ended yet.
        for load in (0, 1):
            assert by_preference(key, dict.fromkeys(REPLICAS, 0) | {preferred: load})[0] == preferred


@given(st.integers(1, 6), st.integers(1, 12))
def test_full_replicas_get_nothing_while_others_have_room(num_replicas: int, capacity: int) -> None:
    loads = dict.fromkeys(REPLICAS[:num_replicas], 0)
    for _ in range(num_replicas * capacity):
        loads[by_preference("popular", loads, capacity=capacity)[0]] += 1
    assert set(loads.values()) == {capacity}
