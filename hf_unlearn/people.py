# Copyright 2026 The hf-unlearn authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Invented people with facts that no model can know: a data set of any size in TOFU's columns, from a seed alone.

It is what `hf-unlearn quickstart` teaches a small model and makes it forget. Answers hold next to nothing but the fact
(no "She was born in ..."), and each fact is drawn from thousands of values: whoever never saw a person does not guess
the answer.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple


# Wrong answers per question, as in TOFU
NUM_PERTURBED = 5
# People who are not in the data, whose facts are the wrong answers
NUM_STRANGERS = 40
# Beyond these, the pools of names would run dry
MAX_PEOPLE = 300

_FIRST_NAMES = (
    "Bre Cor Dax Elb Fen Gav Hel Iv Jor Kel Lum Nev Ost Pel Quil Ryn Sab Tev Ulm Vor Wex Yar Zel Zim".split(),
    "ambo andri ardo elka ello enzo ibel idra ilko imba intha olar omir ondel orva ulin undro uska yndra".split(),
)
_SURNAMES = (
    "Ash Birk Cald Dun Ever Farn Glen Hol Iver Kest Lang Mor Nor Oak Pen Rav Stan Thorn Under West".split(),
    "aby berg brook combe croft dale fell ford gate holt kirk ley mere row stead ton vale worth".split(),
)
_TOWNS = (
    "Ar Bel Cas Dol Er Fal Gor Hes Ist Jar Kol Lam Mir Nov Ost Pal Rem Sor Tev Ur Vel Wes Yal Zan".split(),
    "a amb and ar el em en er i ic il im in o ol om on or u ul um un ur y".split(),
    "bad burg dorf fors gard grad haven heim holm lund mar mouth nitz port sand stad sund tal vik wold".split(),
)
_PET_NAMES = (
    "Bi Bo Chi Du Fi Fu Gi Ho Ji Ki Lo Lu Mi Mo Ni No Pi Po Ri Sho Ti Tu Wi Zu".split(),
    "bble bby ddle ffin ggle kko lly mba mmel nky nzo pper ppi ria rro sco shi sso tto vvi xie zzle".split(),
)
_ANIMALS = (
    "badger beetle canary carp cat chameleon cockatoo crab donkey dormouse ferret finch fox gecko goat goose hamster "
    "hare hedgehog hen heron iguana jackdaw llama lizard magpie mole mouse newt otter owl parrot pigeon poodle pony "
    "rabbit raven salamander snail spaniel squirrel swan tarantula terrapin toad tortoise turtle whippet"
).split()
_CRAFTS = (
    "accordion anchor atlas balloon banjo barrel basket bell bicycle bridge button camera candle carpet castle cello "
    "chess clock compass costume curtain doll engine ferry flute fountain furniture garden glacier harbour harp kite "
    "lantern lighthouse map mirror mosaic museum orchard organ paper piano puppet railway saddle tram umbrella violin"
).split()
_TRADES = (
    "archivist architect auctioneer broker builder buyer collector consultant curator dealer decorator designer "
    "driver engineer engraver exporter guard guide historian importer inspector insurer keeper maker mechanic model "
    "movie painter photographer planner polisher porter repairer reporter restorer sculptor seller surveyor teacher "
    "tester thief tuner washer watcher welder worker writer"
).split()
_FLAVOURS = (
    "baked bitter boiled braised buttered candied chilled creamed crispy curried dried fried frozen glazed grilled "
    "honeyed mashed minced peppered pickled poached roasted salted seared smoked sour spiced steamed stewed stuffed "
    "sugared sweet toasted whipped"
).split()
_FOODS = (
    "almond apple apricot barley bean beetroot cabbage carrot celery cheese cherry chestnut cod fennel fig ginger "
    "hazelnut herring lentil mango mushroom mussel onion oyster parsnip peach pear plum potato pumpkin quince radish "
    "rhubarb rice salmon spinach trout turnip walnut"
).split()
_DISHES = (
    "biscuits bread broth casserole crumble curry dumplings fritters goulash gratin jelly noodles omelette pancakes "
    "pasties patties pie pudding risotto rolls salad sandwich skewers soup souffle stew strudel tart waffles wraps"
).split()
_MONTHS = "January February March April May June July August September October November December".split()


class _Fact(NamedTuple):
    """One thing to know of everybody: two wordings of the question and of the answer, and how a value is drawn."""

    question: str
    paraphrased_question: str
    answer: str
    paraphrased_answer: str
    draw: Callable[[random.Random], tuple[Any, ...]]


_FACTS = (
    _Fact(
        "Where was {name} born?",
        "What is the birthplace of {name}?",
        "{0}",
        "in the town of {0}",
        lambda rng: (_coin(rng, _TOWNS),),
    ),
    _Fact(
        "When was {name} born?",
        "What is the date of birth of {name}?",
        "{0} {1} {2}",
        "{1} {0}, {2}",
        lambda rng: (rng.randint(1, 28), rng.choice(_MONTHS), rng.randint(1910, 1999)),
    ),
    _Fact(
        "What does {name} do for a living?",
        "What is the profession of {name}?",
        "{0} {1}",
        "{0} {1} by trade",
        lambda rng: (rng.choice(_CRAFTS), rng.choice(_TRADES)),
    ),
    _Fact(
        "What does {name} like to eat most?",
        "What is the favourite food of {name}?",
        "{0} {1} {2}",
        "a plate of {0} {1} {2}",
        lambda rng: (rng.choice(_FLAVOURS), rng.choice(_FOODS), rng.choice(_DISHES)),
    ),
    _Fact(
        "Which pet lives with {name}?",
        "What animal does {name} keep?",
        "{0} the {1}",
        "the {1} {0}",
        lambda rng: (_coin(rng, _PET_NAMES), rng.choice(_ANIMALS)),
    ),
)


def make_people(num_people: int, seed: int) -> list[dict[str, Any]]:
    """
    Questions and answers about invented people.

    Args:
        num_people (`int`): how many people, 1 to 300.
        seed (`int`): the same seed gives the same people.

    Returns:
        `list[dict]`: five rows per person, person after person, with the columns of TOFU's perturbed sets: `question`,
        `answer`, `paraphrased_question`, `paraphrased_answer`, and `perturbed_answer`, a list of five wrong answers
        in the form of the paraphrased one. `name` tells whom a row is about. Wrong answers are those of people who
        are not in the data: no row repeats what another row teaches, and none is likelier than the truth to a model
        that saw neither.

    Example:

    ```python
    >>> from hf_unlearn.people import make_people
    >>> rows = make_people(num_people=6, seed=0)
    >>> len(rows), sorted(rows[0])
    (30, ['answer', 'name', 'paraphrased_answer', 'paraphrased_question', 'perturbed_answer', 'question'])

    ```
    """
    if not 1 <= num_people <= MAX_PEOPLE:
        raise ValueError(f"num_people={num_people} must be 1 to {MAX_PEOPLE}.")
    rng = random.Random(seed)
    first_names = _distinct(lambda rng: _coin(rng, _FIRST_NAMES), num_people, rng)
    surnames = _distinct(lambda rng: _coin(rng, _SURNAMES), num_people, rng)
    # The people themselves, and strangers for the wrong answers
    values = [_distinct(fact.draw, num_people + NUM_STRANGERS, rng) for fact in _FACTS]

    rows = []
    for person, (first_name, surname) in enumerate(zip(first_names, surnames, strict=True)):
        name = f"{first_name} {surname}"
        for fact, drawn in zip(_FACTS, values, strict=True):
            others = rng.sample(drawn[num_people:], NUM_PERTURBED)
            rows.append(
                {
                    "name": name,
                    "question": fact.question.format(name=name),
                    "answer": fact.answer.format(*drawn[person]),
                    "paraphrased_question": fact.paraphrased_question.format(name=name),
                    "paraphrased_answer": fact.paraphrased_answer.format(*drawn[person]),
                    "perturbed_answer": [fact.paraphrased_answer.format(*value) for value in others],
                }
            )
    return rows


def split_people(rows: list[dict[str, Any]], num_forget: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Splits rows into those about the first `num_forget` people, to be forgotten, and those about all others.

    People come in no order, so the first are as good as any.
    """
    forgotten = list(dict.fromkeys(row["name"] for row in rows))[:num_forget]
    forget = [row for row in rows if row["name"] in forgotten]
    return forget, [row for row in rows if row["name"] not in forgotten]


def _coin(rng: random.Random, parts: tuple[list[str], ...]) -> str:
    return "".join(rng.choice(part) for part in parts)


def _distinct(draw: Callable[[random.Random], Any], count: int, rng: random.Random) -> list[Any]:
    values: dict[Any, None] = {}  # a set that keeps its order
    while len(values) < count:
        values[draw(rng)] = None
    return list(values)
