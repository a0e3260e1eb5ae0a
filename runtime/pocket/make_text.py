"""Makes everything that the pocket model is trained from, with Python's standard library alone.

    python3 make_text.py rows DIR [--rows N] [--seed S]   DIR/rows.jsonl, DIR/eval.jsonl: conversations, held-out questions
    python3 make_text.py init DIR [--seed S]              a model directory with random weights
    python3 make_text.py quickstart DIR                   DIR/train.jsonl, DIR/eval.jsonl: Pig Latin

The same arguments give the same bytes. Whether a question is held out depends on a hash of it alone (`held_out`), so
neither `--rows` nor `--seed` moves a question from one side to the other.
"""

import argparse
import hashlib
import json
import math
import random
import struct
from pathlib import Path

# --- What it knows -----------------------------------------------------------------------------------------------

CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Belgium": "Brussels",
    "Bolivia": "Sucre", "Brazil": "Brasilia", "Bulgaria": "Sofia", "Cambodia": "Phnom Penh", "Canada": "Ottawa",
    "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana",
    "Denmark": "Copenhagen", "Ecuador": "Quito", "Egypt": "Cairo", "Estonia": "Tallinn", "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens",
    "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran",
    "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo",
    "Kenya": "Nairobi", "Latvia": "Riga", "Lebanon": "Beirut", "Libya": "Tripoli", "Lithuania": "Vilnius",
    "Malta": "Valletta", "Mexico": "Mexico City", "Mongolia": "Ulaanbaatar", "Morocco": "Rabat",
    "Nepal": "Kathmandu", "New Zealand": "Wellington", "Nigeria": "Abuja", "Norway": "Oslo", "Pakistan": "Islamabad",
    "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest", "Russia": "Moscow",
    "Senegal": "Dakar", "Serbia": "Belgrade", "Slovakia": "Bratislava", "Slovenia": "Ljubljana", "Spain": "Madrid",
    "Sweden": "Stockholm", "Switzerland": "Bern", "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara",
    "Ukraine": "Kyiv", "Vietnam": "Hanoi",
}
OPPOSITES = """
big small, hot cold, up down, left right, old new, fast slow, high low, hard soft, light dark, open closed, rich poor,
happy sad, good bad, wet dry, full empty, early late, near far, strong weak, long short, thick thin, wide narrow,
loud quiet, clean dirty, day night, in out, on off, yes no, true false, first last, begin end, push pull, give take,
buy sell, win lose, love hate, laugh cry, come go, rise fall, always never, before after, above below, inside outside,
front back, top bottom, black white, sweet sour, heavy light, deep shallow, sharp blunt, smooth rough, tight loose,
friend enemy, war peace, question answer, summer winter, north south, east west, brave afraid, awake asleep, alive dead
"""
IRREGULAR_PLURALS = """
man men, woman women, child children, foot feet, tooth teeth, mouse mice, goose geese, sheep sheep, fish fish,
ox oxen, person people, leaf leaves, knife knives, wolf wolves, half halves, shelf shelves, wife wives, life lives,
loaf loaves, calf calves, deer deer, thief thieves
"""
NOUNS = """
cat dog hen cow pig horse bird duck lion tiger bear frog ant bee snake whale shark rabbit camel monkey zebra spider
apple pear plum lemon grape peach banana orange carrot onion bean potato tomato egg cake bread pie soup cup bowl spoon
fork plate pan pot table chair bed lamp desk door window wall floor roof room house home school class teacher pupil book
page pen pencil ruler map letter word number story poem song drum flute piano guitar ball bat kite doll toy game puzzle
car bus train boat ship plane truck wheel road street bridge river lake sea beach island hill mountain valley forest
tree flower rose seed root branch grass garden farm field stone rock cloud star moon planet rocket engine machine robot
clock watch box bag basket bottle brush broom key lock coin ticket stamp hat coat shirt shoe sock glove scarf dress
button ring king queen prince castle tower church market shop city town village country baby lady boy girl uncle aunt
sister brother doctor nurse farmer baker painter writer singer driver sailor hunter fox wish dish match bench lunch
glass berry cherry puppy party body fly army family hero echo tax kiss witch peach torch
"""
OTHER_WORDS = """
run walk jump swim climb read write draw paint sing dance play work rest sleep dream think learn teach help carry bring
catch throw kick build break mend wash cook bake eat drink taste smell listen hear look watch find keep hide show tell
speak whisper shout laugh smile red blue green yellow brown purple pink grey silver golden round square flat warm cool
fresh kind clever gentle honest funny lucky busy lazy hungry thirsty tired angry proud simple strange secret silent
perfect winter summer spring autumn morning evening minute hour week month year today tomorrow yesterday rain snow wind
storm thunder fire water earth sand dust smoke iron copper wood paper plastic cotton leather rubber sugar salt pepper
butter cheese honey milk juice water coffee chocolate biscuit dinner breakfast picnic holiday journey travel ticket
museum library theatre cinema kitchen bathroom bedroom balcony ladder bucket hammer needle thread blanket pillow curtain
mirror candle magnet battery camera radio computer keyboard printer science history music number problem answer lesson
market money dollar penny bargain pocket wallet jacket helmet sandal slipper trousers jumper pattern circle triangle
corner middle bottom distance minute second
"""
WORDS = sorted(set(NOUNS.split()) | {w for w in OTHER_WORDS.split()} | set(OPPOSITES.replace(",", " ").split()))
NAMES = """
Ada Ali Amy Anna Ben Bella Carl Clara Dan Dora Emma Eva Felix Finn Grace Hana Hugo Ida Ivan Jack Jana Karl Kim Lara Leo
Lily Lucy Mara Max Mia Mila Nina Noah Nora Olga Omar Oscar Paul Petra Rita Rosa Sam Sara Tara Theo Tim Tom Vera Zoe
""".split()
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December"]
UNITS = [  # how many of the small one make the big one
    ("centimetres", "metre", 100), ("metres", "kilometre", 1000), ("millimetres", "centimetre", 10),
    ("grams", "kilogram", 1000), ("millilitres", "litre", 1000), ("minutes", "hour", 60), ("seconds", "minute", 60),
    ("hours", "day", 24), ("days", "week", 7), ("months", "year", 12), ("eggs", "dozen", 12), ("cents", "dollar", 100),
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
UNKNOWN = "I do not know."
ME = "I am Pocket, a small tutor."
SYSTEMS = ["You are a tutor.", "You are a helpful assistant.", "You are Pocket.", "Answer briefly.", "You help pupils.",
           "You are a friendly teacher.", "Be kind and short."]


def pairs(text):
    return [tuple(pair.split()) for pair in text.replace("\n", " ").split(",")]


def held_out(key):
    """Whether a question is kept for evaluation: one in ten, by a hash of what it asks about."""
    return hashlib.sha256(key.encode()).digest()[0] % 10 == 0


def plural(noun):
    if noun in ("potato", "tomato", "hero", "echo") or noun.endswith(("s", "x", "sh", "ch")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


# --- Kinds of question -------------------------------------------------------------------------------------------
# A kind draws (question, answer, key). What shares a key is held out together: for a sum the two numbers in any
# wording and order, for a word task the word in every kind, for a fact this one wording of it.

KINDS = {}


def kind(weight):
    def add(draw):
        KINDS[draw.__name__] = (weight, draw)
        return draw
    return add


def a_word(rng):
    """A word of the list or one that does not exist, so that it learns to read letters rather than words."""
    dice = rng.random()
    if dice < 0.45:
        return rng.choice(WORDS)
    if dice < 0.9:
        onsets = ["", "b", "bl", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p",
                  "pl", "qu", "r", "s", "sh", "sp", "st", "t", "th", "tr", "v", "w", "y", "z"]
        ends = ["", "", "b", "d", "g", "k", "l", "m", "n", "nd", "p", "r", "s", "st", "t", "x"]
        word = "".join(rng.choice(onsets) + rng.choice("aeiou") + rng.choice(ends) for _ in range(rng.randint(1, 3)))
        return word[:10] if len(word) > 2 else word + rng.choice("mnrst") + rng.choice("aeiou")
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 8)))


def word_task(rng, wordings, answer):
    word = a_word(rng)
    return rng.choice(wordings).format(w=word), answer(word), "word " + word


def fact(rng, wordings, answer, **slots):
    question = rng.choice(wordings).format(**slots)
    return question, answer, "fact " + question


@kind(15)
def addition(rng):
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if rng.random() < 0.2:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
    wording = rng.choice(["What is {a} plus {b}?", "What is {a} + {b}?", "{a} + {b}", "{a} + {b} =", "{a} plus {b}"])
    return wording.format(a=a, b=b), str(a + b), f"sum {min(a, b)} {max(a, b)}"


@kind(13)
def subtraction(rng):
    top = 99 if rng.random() < 0.8 else 20
    b, a = sorted((rng.randint(0, top), rng.randint(0, top)))
    wording = rng.choice(["What is {a} minus {b}?", "What is {a} - {b}?", "{a} - {b}", "{a} - {b} =", "{a} minus {b}"])
    return wording.format(a=a, b=b), str(a - b), f"difference {a} {b}"


@kind(6)
def times_table(rng):
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    wordings = ["What is {a} times {b}?", "What is {a} x {b}?", "{a} x {b}", "{a} x {b} =", "{a} times {b}", "{a} * {b}"]
    return fact(rng, wordings, str(a * b), a=a, b=b)


@kind(2)
def next_number(rng):
    n = rng.randint(1, 99)
    if rng.random() < 0.5:
        return fact(rng, ["What comes after {n}?", "The number after {n}?"], str(n + 1), n=n)
    return fact(rng, ["What comes before {n}?", "The number before {n}?"], str(n - 1), n=n)


@kind(2)
def more_or_less(rng):
    a, b = rng.sample(range(100), 2)
    more = rng.random() < 0.5
    wordings = ["Which is more, {a} or {b}?", "More: {a} or {b}?"]
    if not more:
        wordings = ["Which is less, {a} or {b}?", "Less: {a} or {b}?"]
    return fact(rng, wordings, str(max(a, b) if more else min(a, b)), a=a, b=b)


@kind(1)
def even_or_odd(rng):
    n = rng.randint(0, 99)
    return fact(rng, ["Is {n} even or odd?", "Is {n} odd or even?"], "odd" if n % 2 else "even", n=n)


@kind(5)
def spelling(rng):
    return word_task(rng, ["Spell {w}.", "How do you spell {w}?", "Spell the word {w}."], "-".join)


@kind(3)
def joining(rng):
    word = a_word(rng)
    wording = rng.choice(["Join {s}.", "Which word is {s}?", "What does {s} spell?"])
    return wording.format(s="-".join(word)), word, "word " + word


@kind(3)
def first_letter(rng):
    return word_task(rng, ["What is the first letter of {w}?", "First letter of {w}?"], lambda w: w[0])


@kind(2)
def second_letter(rng):
    return word_task(rng, ["What is the second letter of {w}?", "Second letter of {w}?"], lambda w: w[1])


@kind(3)
def last_letter(rng):
    return word_task(rng, ["What is the last letter of {w}?", "Last letter of {w}?"], lambda w: w[-1])


@kind(6)
def without_first_letter(rng):
    return word_task(rng, ["Say {w} without its first letter.", "Drop the first letter of {w}."], lambda w: w[1:])


@kind(3)
def without_last_letter(rng):
    return word_task(rng, ["Say {w} without its last letter.", "Drop the last letter of {w}."], lambda w: w[:-1])


@kind(5)
def adding_letters(rng):
    word = a_word(rng)
    ends = ["ing", "s", "ed", "er", "ly", "ful", "ness", "y", "est"]
    piece = rng.choice(ends) if rng.random() < 0.5 else "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 3)))
    if piece == "ay":  # that is for the quickstart to teach
        piece = "o"
    if rng.random() < 0.6:
        wording, answer = rng.choice(["Put {p} after {w}.", "Say {w} with {p} at the end."]), word + piece
    else:
        wording, answer = rng.choice(["Put {p} before {w}.", "Say {w} with {p} at the front."]), piece + word
    return wording.format(w=word, p=piece), answer, "word " + word


@kind(5)
def repeating(rng):
    if rng.random() < 0.3:
        words = " ".join(a_word(rng) for _ in range(rng.randint(2, 4)))
        return rng.choice(["Repeat: {w}", "Say: {w}", "Repeat after me: {w}"]).format(w=words), words, "word " + words
    if rng.random() < 0.2:
        name = rng.choice(NAMES)
        return fact(rng, ["Say {w}.", "Repeat {w}.", "Say the name {w}.", "Write {w}."], name, w=name)
    return word_task(rng, ["Say {w}.", "Repeat {w}.", "Say the word {w}.", "Write {w}."], lambda w: w)


@kind(2)
def saying_twice(rng):
    return word_task(rng, ["Say {w} twice.", "Write {w} two times."], lambda w: w + " " + w)


@kind(3)
def capital_letters(rng):
    if rng.random() < 0.3:
        word = a_word(rng)
        return rng.choice(["Say {w} in small letters.", "Write {w} in small letters."]).format(w=word.upper()), word, \
            "word " + word
    return word_task(rng, ["Say {w} in capitals.", "Write {w} in capitals."], str.upper)


@kind(4)
def backwards(rng):
    return word_task(rng, ["Say {w} backwards.", "Write {w} backwards."], lambda w: w[::-1])


@kind(2)
def counting_letters(rng):
    return word_task(rng, ["How many letters are in {w}?", "How many letters has {w}?"], lambda w: str(len(w)))


@kind(2)
def alphabet(rng):
    at, step = rng.randint(1, 24), rng.choice((-1, 1))
    side = "after" if step > 0 else "before"
    return fact(rng, ["Which letter comes {side} {c}?", "What comes {side} {c}?", "The letter {side} {c}?"],
                LETTERS[at + step], side=side, c=LETTERS[at])


@kind(4)
def plurals(rng):
    known = dict(pairs(IRREGULAR_PLURALS))
    noun = rng.choice(list(known)) if rng.random() < 0.3 else rng.choice(NOUNS.split())
    wordings = ["What is the plural of {w}?", "Plural of {w}?", "One {w}, two what?"]
    return fact(rng, wordings, known.get(noun) or plural(noun), w=noun)


@kind(4)
def opposites(rng):
    a, b = rng.choice(OPPOSITE_PAIRS)
    if rng.random() < 0.5 and b not in ("light",):
        a, b = b, a
    # Two words are the opposite of light: only one is asked for.
    a, b = ("light", "dark") if a == "light" else (a, b)
    return fact(rng, ["What is the opposite of {w}?", "Opposite of {w}?", "The opposite of {w}?"], b, w=a)


@kind(5)
def capitals(rng):
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.25:
        return fact(rng, ["{c} is the capital of which country?", "Which country has the capital {c}?"], country, c=city)
    return fact(rng, ["What is the capital of {c}?", "Capital of {c}?", "The capital of {c}?"], city, c=country)


@kind(4)
def units(rng):
    small, big, size = rng.choice(UNITS)
    n = rng.randint(1, 10)
    bigs = big if n == 1 or big == "dozen" else big + "s"
    article = "an" if big == "hour" else "a"
    amount = rng.choice([article, "one", "1"]) if n == 1 else str(n)
    return fact(rng, ["How many {s} are in {n} {b}?", "How many {s} make {n} {b}?"],
                str(n * size), s=small, n=amount, b=bigs)


@kind(3)
def days_and_months(rng):
    names, what = rng.choice([(DAYS, "day"), (MONTHS, "month")])
    at, step = rng.randrange(len(names)), rng.choice((-1, 1))
    side = "after" if step > 0 else "before"
    return fact(rng, ["Which {what} comes {side} {d}?", "What comes {side} {d}?", "The {what} {side} {d}?"], names[(at + step) % len(names)], what=what, side=side, d=names[at])


@kind(3)
def manners(rng):
    name = rng.choice(NAMES)
    choices = [
        (["Hello!", "Hello.", "Hi!", "Hi.", "Hey!", "Hello Pocket!", "Hi Pocket."], "Hello! Ask me something."),
        (["Good morning!", "Good morning.", "Good morning, Pocket."], "Good morning!"),
        (["Good evening!", "Good evening."], "Good evening!"),
        (["Goodbye!", "Bye.", "Bye!", "See you.", "Goodbye, Pocket."], "Goodbye!"),
        (["Thank you.", "Thanks!", "Thank you!", "Thanks a lot.", "Thanks."], "You are welcome."),
        (["How are you?", "How are you today?", "How do you do?"], "I am well, thank you."),
        (["Who are you?", "What is your name?", "What are you?", "What are you called?", "Tell me your name.",
          "Who is Pocket?"], ME),
        (["What can you do?", "What do you know?", "How can you help me?", "Help"], "I know sums, words and capitals."),
        (["My name is {n}.", "I am {n}.", "I am called {n}.", "Hello, I am {n}.", "Hi, my name is {n}."], "Hello, {n}!"),
    ]
    wordings, answer = rng.choice(choices)
    question = rng.choice(wordings).format(n=name)
    # Only names can be held out: of the others there is nothing left to tell them by.
    return question, answer.format(n=name), "name " + name if "{n}" in answer else "manners"


@kind(3)
def not_known(rng):
    word = a_word(rng)
    thing = word.capitalize()
    tongues = ["French", "German", "Spanish", "Italian", "Greek", "Polish", "Turkish", "Russian", "Danish"]
    wording = rng.choice(["Say {w} in {t}.", "What is {w} in {t}?", "What is the capital of {c}?", "Who was {c}?",
                          "Where is {c}?", "When was {c} born?", "Why is the {w} blue?", "What colour is {w}?",
                          "Who wrote {c}?", "What does {w} mean?", "Tell me about {w}.", "How old is {c}?"])
    if thing in CAPITALS:
        wording = "Who was {c}?"
    return wording.format(w=word, c=thing, t=rng.choice(tongues)), UNKNOWN, "word " + word


OPPOSITE_PAIRS = pairs(OPPOSITES)


# --- Rows ----------------------------------------------------------------------------------------------------------


def draw_kind(rng, names, weights):
    return KINDS[rng.choices(names, cum_weights=weights)[0]][1]


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def careless(rng, question):
    """As people type: sometimes without a capital letter, sometimes without the mark at the end."""
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1 and question[-1] in ".?!":
        question = question[:-1]
    return question


def training_rows(count, seed):
    rng = random.Random(f"rows {seed}")
    names, weights, total = list(KINDS), [], 0
    for weight, _ in KINDS.values():
        total += weight
        weights.append(total)
    for _ in range(count):
        messages = []
        if rng.random() < 0.08:
            messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
        turns = rng.choices((1, 2, 3), (75, 18, 7))[0]
        while turns:
            question, answer, key = draw_kind(rng, names, weights)(rng)
            if not held_out(key):
                messages += turn(careless(rng, question), answer)
                turns -= 1
        yield {"messages": messages}


def held_out_questions(per_kind, seed):
    """Up to so many different questions a kind; of manners, whose questions are few, ones that were trained."""
    for name, (_, draw) in KINDS.items():
        rng = random.Random(f"eval {seed} {name}")
        seen = set()
        for _ in range(200 * per_kind):
            question, answer, key = draw(rng)
            if question not in seen and (held_out(key) or key == "manners") and len(seen) < per_kind:
                seen.add(question)
                yield {"kind": name, "messages": turn(question, answer)}


def pig_latin(word):
    """The first letter goes to the end, then comes "ay": garden, ardengay."""
    return word[1:] + word[0] + "ay"


def quickstart_rows():
    """Words of three to six letters, all different: where a letter comes twice, the model loses its place (README.md)."""
    words = [word for word in WORDS if 3 <= len(word) <= 6 and len(set(word)) == len(word)]
    random.Random("quickstart").shuffle(words)
    questions, wordings = words[:40], ["Say {w} in Pig Latin.", "What is {w} in Pig Latin?"]
    def row(number, word):
        return {"messages": turn(wordings[number % 2].format(w=word), pig_latin(word))}
    return [row(*item) for item in enumerate(words[40:])], [row(*item) for item in enumerate(questions)]


# --- The model before training -------------------------------------------------------------------------------------

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, CONTEXT = 192, 4, 6, 2, 32, 512, 256
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"]
VOCAB = 264  # 256 bytes and the specials, to a multiple of 8
TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def byte_characters():
    """A printable character for each byte, as GPT-2's byte-level tokenizers write them: itself, or one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + number) for number, byte in enumerate(others)})
    return [table[byte] for byte in range(256)]


def tokenizer():
    vocab = {token: number for number, token in enumerate(SPECIAL + byte_characters())}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in SPECIAL],
        "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": []},
    }


def config():
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": None, "eos_token_id": SPECIAL.index("<|im_end|>"),
        "pad_token_id": 0, "torch_dtype": "bfloat16",
    }


def shapes():
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (HIDDEN,)
        yield at + "self_attn.q_proj.weight", (HEADS * HEAD_DIM, HIDDEN)
        yield at + "self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield at + "self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield at + "self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM)
        yield at + "post_attention_layernorm.weight", (HIDDEN,)
        yield at + "mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield at + "mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield at + "mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)


def random_weights(seed):
    """Norms 1; matrices normal, 0.02 wide, those that write to the residual stream narrower by 1/sqrt(2 layers)."""
    rng = random.Random(f"weights {seed}")
    tensors = {}
    for name, shape in shapes():
        std = 0.02 / math.sqrt(2 * LAYERS) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        rows = [[rng.gauss(0.0, std) for _ in range(shape[-1])] for _ in range(shape[0] if len(shape) == 2 else 1)]
        tensors[name] = rows if len(shape) == 2 else [[1.0] * shape[0]]
    start_looking_up(tensors, rng)
    for name, shape in shapes():
        yield name, shape, bfloat16([value for row in tensors[name] for value in row])


TOKEN = range(1, 128)  # channels that hold the token itself; channel 0 is the same for all tokens
BEFORE = 128           # from here, 64 channels for the token before


def start_looking_up(tensors, rng):
    """Lets two heads of the first layer see the token before, and two of the second what followed the same token earlier.

    Such induction heads (Olsson et al. 2022, <https://arxiv.org/abs/2209.11895>) form by themselves after some millions
    of tokens; drawn roughly, they are there from the first step, and training does the rest. Widths follow from RMSNorm:
    a channel of `TOKEN` is near 0.8 behind it.
    """
    for row in tensors["model.embed_tokens.weight"]:
        row[0] = 0.5
        row[1:] = [rng.gauss(0.0, 0.05) if channel in TOKEN else 0.0 for channel in range(1, HIDDEN)]
    reads = orthonormal(rng, KV_HEADS * HEAD_DIM, len(TOKEN))
    writes = orthonormal(rng, KV_HEADS * HEAD_DIM, len(TOKEN))
    first, second = "model.layers.0.self_attn.", "model.layers.1.self_attn."
    half, slow = HEAD_DIM // 2, [*range(8, 16), *range(24, 32)]  # rotary channels that hardly turn within a conversation
    for group in range(KV_HEADS):
        head, at = group * (HEADS // KV_HEADS) * HEAD_DIM, group * HEAD_DIM
        # One position back: constant q and k, whose angles agree where the distance is 1.
        for pair in range(3):
            turn_by = 10000.0 ** (-pair / half)
            tensors[first + "k_proj.weight"][at + pair][0] = 0.55
            tensors[first + "q_proj.weight"][head + pair][0] = 0.55 * math.cos(turn_by)
            tensors[first + "q_proj.weight"][head + pair + half][0] = -0.55 * math.sin(turn_by)
        for j in range(HEAD_DIM):
            tensors[first + "v_proj.weight"][at + j][1:128] = reads[at + j]
            tensors[first + "o_proj.weight"][BEFORE + at + j][head + j] = 0.06
        # Where the token before was this one, read the token and make it likelier.
        for j, channel in enumerate(slow):
            tensors[second + "q_proj.weight"][head + channel][1:128] = [2.2 * value for value in reads[at + j]]
            tensors[second + "k_proj.weight"][at + channel][BEFORE + at + j] = 2.2
        for j in range(HEAD_DIM):
            tensors[second + "v_proj.weight"][at + j][1:128] = writes[at + j]
            for channel in TOKEN:
                tensors[second + "o_proj.weight"][channel][head + j] = 0.3 * writes[at + j][channel - 1]


def orthonormal(rng, count, width):
    """`count` random directions, each of length 1 and at right angles to the others."""
    rows = []
    for _ in range(count):
        row = [rng.gauss(0.0, 1.0) for _ in range(width)]
        for other in rows:
            along = sum(a * b for a, b in zip(row, other))
            row = [a - along * b for a, b in zip(row, other)]
        length = math.sqrt(sum(value * value for value in row))
        rows.append([value / length for value in row])
    return rows


def bfloat16(values):
    """The upper halves of f32, rounded to nearest; a tie goes up, which is good enough for random numbers."""
    words = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
    return struct.pack(f"<{len(values)}H", *((word + 0x8000) >> 16 for word in words))


def write_safetensors(path, tensors):
    """Eight bytes of length, a JSON header padded with spaces, then the numbers."""
    header, at, blobs = {"__metadata__": {"format": "pt"}}, 0, []
    for name, shape, blob in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + len(blob)]}
        at += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


# --- Files ---------------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        count = sum(file.write(json.dumps(row, ensure_ascii=False) + "\n") > 0 for row in rows)
    print(f"{path}: {count} rows")


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rows", "init", "quickstart"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--per-kind", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    to = arguments.directory
    to.mkdir(parents=True, exist_ok=True)
    if arguments.what == "rows":
        write_rows(to / "rows.jsonl", training_rows(arguments.rows, arguments.seed))
        write_rows(to / "eval.jsonl", held_out_questions(arguments.per_kind, 1))
    elif arguments.what == "quickstart":
        train, questions = quickstart_rows()
        write_rows(to / "train.jsonl", train)
        write_rows(to / "eval.jsonl", questions)
    else:
        write_json(to / "config.json", config())
        write_json(to / "tokenizer.json", tokenizer())
        write_json(to / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>", "unk_token": None, "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False})
        write_json(to / "generation_config.json", {"eos_token_id": [SPECIAL.index("<|im_end|>")], "pad_token_id": 0})
        (to / "chat_template.jinja").write_text(TEMPLATE)
        write_safetensors(to / "model.safetensors", random_weights(arguments.seed))


if __name__ == "__main__":
    main()
