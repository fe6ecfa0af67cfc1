"""Train the tiny offline base: a Qwen2 model of under a million parameters on synthetic string tasks.

    OMP_NUM_THREADS=1 python examples/tiny/make_base.py

It writes examples/tiny/base: config, generation_config, float32 weights and a byte-level tokenizer that carries the
Qwen2 chat template. The tasks ask to copy, find, quote, wrap, join and rearrange pieces of the prompt, so that a LoRA
adapter, which leaves embeddings and head as they are, later finds every byte and every way of copying in place. They
contain no JSON objects and none of the sentences of make_data.py.
"""

import argparse
import math
import random
import string
import time
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AddedToken, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Every row repeats these texts of the chat template. One token for each of them shortens a row by 46 tokens.
FRAME = ("system\n", "user\n", "assistant\n", "You are a helpful assistant.")
VOCAB_SIZE = 320
IGNORED = -100
MAX_LENGTH = 192


# ---------------------------------------------------------------- tokenizer and model


def build_tokenizer():
    """One token per byte, no merges, then the special tokens and the fixed texts of the chat frame."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={char: index for index, char in enumerate(alphabet)},
        merges=[],
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=4096,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in FRAME])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer):
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    seed_previous_token_heads(model)
    return model


@torch.no_grad()
def seed_previous_token_heads(model, strength=3.5):
    """Start three heads of the first layer looking one, two and three tokens back.

    Copying needs heads that know what came before each token, and such heads are slow to find by chance. Under
    rotary positions the query and key biases alone set one up: the query bias is the key bias turned back by the
    distance wanted. Training is free to change them.
    """
    attention, config = model.model.layers[0].self_attn, model.config
    width = config.hidden_size // config.num_attention_heads
    half = width // 2
    attention.k_proj.bias.view(-1, width)[:, :half] = strength
    for head, query in enumerate(attention.q_proj.bias.view(-1, width)[:3]):
        angles = (head + 1) * model.model.rotary_emb.inv_freq
        query[:half], query[half:] = strength * angles.cos(), -strength * angles.sin()


# ---------------------------------------------------------------- material for the tasks

ENGLISH = str.split("""
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name president team minute idea kid body back parent face others
level office door health person art war history party result change morning reason research girl guy moment air
teacher force count red blue green small large open close train boat plane hotel ticket seat
""")
MONTHS = str.split("""
January February March April May June July August September October November December today tomorrow noon midnight
Easter winter summer spring
""")
ONSETS = str.split("b c d f g h j k l m n p r s t v w z br ch st tr")
SYLLABLES = [onset + vowel for onset in ONSETS for vowel in str.split("a e i o u ia au")]
CODAS = ["", "", "", "n", "r", "s", "l", "ck", "nd", "t", "m", "x", "y"]
BRACKETS = ["[]", "()", "{}", "<>", '""', "''", "``", "**", "__", "||", "##"]
SEPARATORS = [",", ", ", ";", "; ", ":", ": ", "|", " | ", "/", "-", " - ", "+", "_", ".", "=", " = ", "&", " and "]


def pseudo_word(rng):
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3))) + rng.choice(CODAS)


def random_string(rng, alphabet=string.ascii_lowercase, low=1, high=8):
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))


def word(rng):
    """A word of any kind: made of syllables, random, English, capitalised, numeric or mixed."""
    kind = rng.random()
    if kind < 0.3:
        return pseudo_word(rng)
    if kind < 0.5:
        return random_string(rng)
    if kind < 0.6:
        return rng.choice(ENGLISH)
    if kind < 0.8:
        return pseudo_word(rng).capitalize()
    if kind < 0.9:
        return number(rng)
    return random_string(rng, string.ascii_letters + string.digits)


def number(rng):
    return str(rng.randint(0, 10 ** rng.randint(1, 3)))


def person(rng):
    parts = [pseudo_word(rng) if rng.random() < 0.7 else random_string(rng, low=3) for _ in range(2)]
    return " ".join(part.capitalize() for part in parts[: rng.choice((1, 2, 2, 2))])


def words(rng, low, high):
    """Distinct words."""
    return list(dict.fromkeys(word(rng) for _ in range(rng.randint(low, high))))


def phrase(rng, low=1, high=5):
    return " ".join(words(rng, low, high))


# ---------------------------------------------------------------- tasks: each returns (prompt, answer)


def task_copy(rng):
    if rng.random() < 0.4:
        text = random_string(rng, string.printable[:95], 3, 24).strip() or "!"
    else:
        text = phrase(rng, 1, 6)
    return rng.choice(("Copy: ", "Repeat: ", "Say ")) + text, text


def task_wrap(rng):
    pair = rng.choice(BRACKETS)
    items = words(rng, 1, 4)
    return f"Wrap each in {pair}: " + " ".join(items), " ".join(pair[0] + item + pair[1] for item in items)


def task_join(rng):
    separator, pair = rng.choice(SEPARATORS), rng.choice(BRACKETS + [""] * 4)
    items = words(rng, 2, 5)
    answer = (pair[:1] + separator.join(items) + pair[1:]) if pair else separator.join(items)
    return f"Join with {separator!r}" + (f" inside {pair}" if pair else "") + ": " + " ".join(items), answer


def task_split(rng):
    separator, items = rng.choice(SEPARATORS), words(rng, 2, 5)
    return f"Split at {separator!r}: " + separator.join(items), " ".join(items)


def task_neighbour(rng):
    items = words(rng, 3, 7)
    at = rng.randrange(len(items) - 1) if len(items) > 1 else 0
    left, right = items[at], items[min(at + 1, len(items) - 1)]
    if rng.random() < 0.6:
        return f"Word after {left}: " + " ".join(items), right
    return f"Word before {right}: " + " ".join(items), left


def task_pick(rng):
    items = words(rng, 2, 6)
    label, chosen = rng.choice(
        (
            ("First word", items[0]),
            ("Last word", items[-1]),
            ("Second word", items[min(1, len(items) - 1)]),
            ("Numbers", " ".join(item for item in items if item.isdigit()) or "none"),
            ("Capitals", " ".join(item for item in items if item[0].isupper()) or "none"),
        )
    )
    return f"{label}: " + " ".join(items), chosen


def task_order(rng):
    first, *rest = words(rng, 2, 4)
    label, answer = rng.choice(
        (
            ("Move the first word to the end", " ".join([*rest, first])),
            ("Move the last word to the front", " ".join([*rest[-1:], first, *rest[:-1]])),
            ("Last, first", f"{' '.join(rest)}, {first}"),
            ("Twice", " ".join([first, *rest] * 2)),
        )
    )
    return f"{label}: " + " ".join([first, *rest]), answer


def task_case(rng):
    text = " ".join(pseudo_word(rng) if rng.random() < 0.5 else random_string(rng) for _ in range(rng.randint(1, 4)))
    label, change = rng.choice((("Title", str.title), ("Upper", str.upper), ("Lower", str.lower)))
    source = text.upper() if change is str.lower else text
    return f"{label} case: {source}", change(text)


def task_lookup(rng):
    keys, link, gap = (
        words(rng, 2, 5),
        rng.choice(("=", ":", ": ", " -> ", " is ")),
        rng.choice((" ", ", ", "; ", "\n")),
    )
    pairs = [(key, word(rng) if rng.random() < 0.7 else person(rng)) for key in keys]
    key, value = rng.choice(pairs)
    return gap.join(k + link + v for k, v in pairs) + f"\n{key}?", value


def task_replace(rng):
    items = words(rng, 2, 5)
    old, new = rng.choice(items), word(rng)
    return f"Replace {old} by {new}: " + " ".join(items), " ".join(new if item == old else item for item in items)


def task_tags(rng):
    keys = words(rng, 1, 3)
    pairs = [(key, word(rng)) for key in keys]
    return "Tags: " + ", ".join(f"{k} {v}" for k, v in pairs), "".join(f"<{k}>{v}</{k}>" for k, v in pairs)


# ---------------------------------------------------------------- records: fields written in a style that is shown


def random_style(rng):
    """A way to write key and value pairs: (brackets, key quote, value quote, link, gap, bare numbers). Never JSON."""
    while True:
        style = (
            rng.choice(["{}", "{}", "[]", "()", "<>", ""]),
            rng.choice(['"', '"', "'", "", ""]),
            rng.choice(['"', '"', "'", "", ""]),
            rng.choice([": ", ":", "=", " = ", " -> ", "|", " is "]),
            rng.choice([", ", ", ", ",", "; ", ";", " | ", "\n", " "]),
            rng.random() < 0.5,
        )
        if not (style[0] == "{}" and style[1] == '"' and style[3].strip() == ":"):
            return style


def write_record(style, pairs):
    pair, key_quote, value_quote, link, gap, bare = style
    written = []
    for key, value in pairs:
        quote = "" if bare and value.isdigit() else value_quote
        written.append(f"{key_quote}{key}{key_quote}{link}{quote}{value}{quote}")
    return pair[:1] + gap.join(written) + pair[1:]


def show_style(style):
    """The style as the prompt shows it: with k and v in place of keys and values, and 1 where numbers stay bare."""
    return write_record(style, [("k", "v"), ("k", "1")])


def task_record(rng):
    keys, style = words(rng, 1, 4), random_style(rng)
    pairs = [(key, rng.choice((word, word, person, number))(rng)) for key in keys]
    source = rng.choice((", ", "; ", "\n")).join(f"{key} {value}" for key, value in pairs)
    return f"As {show_style(style)}: {source}", write_record(style, pairs)


def task_table(rng):
    keys, style = words(rng, 2, 4), random_style(rng)
    values = [word(rng) for _ in keys]
    return f"As {show_style(style)}:\n{','.join(keys)}\n{','.join(values)}", write_record(
        style, list(zip(keys, values, strict=True))
    )


# ---------------------------------------------------------------- sentences about sales, visits and parcels

FIELD_NAMES = {
    "who": ("who", "person", "buyer", "owner"),
    "number": ("number", "amount", "how many"),
    "thing": ("thing", "item", "what"),
    "place": ("place", "where", "town"),
    "time": ("time", "when", "month"),
}
CLAUSES = (
    "{who} bought {number} {thing} in {place} in {time}.",
    "{number} {thing} were sent to {place} by {who}, {time}.",
    "In {time} {who} sold {number} {thing} at {place}.",
    "From {place}: {who} found {number} {thing} during {time}.",
    "{who} from {place} has {number} {thing} since {time}.",
    "The {thing} of {who} ({number}) came from {place} in {time}.",
    "My boss {who} saw {number} {thing} near {place}, {time}.",
    "Dear all, {who} ships {number} {thing} to {place} before {time}!",
    "{time}, {place}, {number} {thing}, {who}",
    "Until {time} there are {number} {thing} in {place}. Ask {who}.",
    "I am {who} and I left {number} {thing} in {place} last {time}.",
    "Who paid? {who} paid {number} {thing} for {place} on {time}.",
)


def clause(rng, change=None):
    """A sentence and its fields; change may edit the fields before they are written."""
    fields = {
        "who": person(rng),
        "number": number(rng),
        "thing": rng.choice(ENGLISH) + "s" if rng.random() < 0.5 else pseudo_word(rng),
        "place": pseudo_word(rng).capitalize() if rng.random() < 0.7 else random_string(rng, low=3).capitalize(),
        "time": rng.choice(MONTHS) if rng.random() < 0.6 else pseudo_word(rng).capitalize(),
    }
    if change:
        change(rng, fields)
    if rng.random() < 0.7:
        return rng.choice(CLAUSES).format(**fields), fields
    # A sentence of no fixed shape: each field behind its own sign word, in any order.
    signs = {
        "who": ("by", "for", "with", "from Mr", "name"),
        "number": ("count", "about", "exactly", "no."),
        "thing": ("the", "item", "of"),
        "place": ("in", "to", "at", "near"),
        "time": ("on", "until", "since", "every"),
    }
    order = rng.sample(list(fields), len(fields))
    return " ".join(f"{rng.choice(signs[key])} {fields[key]}" for key in order), fields


def alike(rng, fields):
    """Let several fields begin with the same letters, so that copying one of them must not slip into another."""
    stem = fields["place"][: rng.randint(1, 3)]
    first, *rest = fields["who"].split(" ")
    if rest and rng.random() < 0.5:
        rest = [stem + rest[0][len(stem) :]]
    else:
        first = stem + first[len(stem) :]
    fields["who"] = " ".join([first, *rest])
    if rng.random() < 0.3:
        fields["time"] = stem + pseudo_word(rng)
    if rng.random() < 0.3:
        fields["thing"] = stem.lower() + pseudo_word(rng)


def task_ask(rng, change=None):
    text, fields = clause(rng, change)
    key = rng.choice(list(fields))
    return f"{text}\n{rng.choice(FIELD_NAMES[key])}?", fields[key]


def task_fields(rng, change=None):
    """Several fields, in the asked order, after their asked names or alone."""
    text, fields = clause(rng, change)
    asked = rng.sample(list(fields), rng.choice((2, 3, 4, 4)))
    names = [rng.choice(FIELD_NAMES[key]) for key in asked]
    if rng.random() < 0.3:
        gap = rng.choice((", ", "; ", " | ", "\n", "/"))
        return f"{text}\n{gap.join(names)}", gap.join(fields[key] for key in asked)
    style = random_style(rng)
    return f"{text}\n{', '.join(names)} as {show_style(style)}", write_record(
        style, [(name, fields[key]) for name, key in zip(names, asked, strict=True)]
    )


def task_ask_alike(rng):
    return task_ask(rng, alike)


def task_fields_alike(rng):
    return task_fields(rng, alike)


EASY = (task_copy, task_wrap, task_neighbour, task_lookup, task_ask)
FIRST_ROUND = {  # tasks with their shares of the mixture
    task_copy: 3,
    task_wrap: 1,
    task_join: 1,
    task_split: 1,
    task_neighbour: 1,
    task_pick: 1,
    task_order: 1,
    task_case: 1,
    task_lookup: 2,
    task_replace: 0.5,
    task_tags: 1,
    task_record: 4,
    task_table: 0.5,
    task_ask: 4,
    task_fields: 9,
}
SECOND_ROUND = {  # more of the sentences, and harder ones
    **dict.fromkeys(FIRST_ROUND, 0.5),
    task_copy: 2,
    task_lookup: 2,
    task_record: 3,
    task_ask: 4,
    task_fields: 5,
    task_ask_alike: 5,
    task_fields_alike: 7,
}


# ---------------------------------------------------------------- rows and training


def encode_task(tokenizer, prompt, answer):
    """Token ids and labels of one chat row; the loss counts the answer and <|im_end|> only."""
    frame = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer(frame)["input_ids"]
    answer_ids = tokenizer(answer + "<|im_end|>")["input_ids"]
    return prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids


def encode_repeat(tokenizer, rng, length=56):
    """Plain text that returns to pieces of itself; the loss counts each piece from its second character on."""
    ids = tokenizer(random_string(rng, string.ascii_letters + string.digits, 8, 24))["input_ids"]
    labels = [IGNORED] * len(ids)
    while len(ids) < length:
        size = rng.randint(5, 10)
        start = rng.randint(0, len(ids) - size) if len(ids) > size else 0
        piece = ids[start : start + size]
        ids = ids + piece
        labels += [IGNORED, *piece[1:]]
    return ids[:length], labels[:length]


def make_pool(tokenizer, rng, size, mixture, early):
    """Rows for the next steps. The share named early, 1 to 0, goes to repetitions and easy tasks."""
    rows = []
    while len(rows) < size:
        if rng.random() < 0.02 + 0.4 * early:
            row = encode_repeat(tokenizer, rng)
        else:
            task = rng.choice(EASY) if rng.random() < early else rng.choices(list(mixture), list(mixture.values()))[0]
            row = encode_task(tokenizer, *task(rng))
        if len(row[0]) <= MAX_LENGTH:
            rows.append(row)
    return rows


def collate(rows, pad_id):
    width = -(-max(len(ids) for ids, _ in rows) // 16) * 16
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    return ids, labels


def batches(tokenizer, rng, batch, steps, mixture, gently, pool=16):
    """Rows of like length go together, so that little of a batch is padding. Gently: easy rows over the first fifth."""
    step = 0
    while step < steps:
        early = max(0.0, 1 - step / steps * 5) if gently else 0.0
        rows = sorted(make_pool(tokenizer, rng, batch * pool, mixture, early), key=lambda row: len(row[0]))
        groups = [rows[at : at + batch] for at in range(0, len(rows), batch)]
        rng.shuffle(groups)
        for group in groups[: steps - step]:
            yield collate(group, tokenizer.pad_token_id)
            step += 1


def answer_loss(model, ids, labels):
    """Causal loss. Right padding needs no attention mask."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def build_optimizers(model, lr, muon_lr):
    """Muon for the weight matrices of the layers, AdamW for the embeddings, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = (
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.02, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def update(model, optimizers, batch, share):
    """One step at the given share of the peak learning rates; returns the loss."""
    loss = answer_loss(model, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def teach_copying(model, tokenizer, args):
    """Repetitions alone until the model copies: the heads that do it form within a few hundred steps."""
    rng, optimizers = random.Random(args.seed), build_optimizers(model, args.lr, args.muon_lr)
    mean = step = 0
    while step < 100 or mean > 0.5:
        batch = collate([encode_repeat(tokenizer, rng) for _ in range(args.batch)], tokenizer.pad_token_id)
        loss = update(model, optimizers, batch, min(1.0, (step + 1) / 50))
        step += 1
        mean = 0.95 * mean + 0.05 * loss
    print(f"copying: {step} steps", flush=True)
    return rng, optimizers


def teach_tasks(model, optimizers, rows, steps, name, warmup=0):
    """A round of tasks under a cosine schedule."""
    started, tokens, mean = time.time(), 0, None
    for step, batch in enumerate(rows, start=1):
        share = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = update(model, optimizers, batch, share * min(1.0, step / max(1, warmup)))
        mean = loss if mean is None else 0.97 * mean + 0.03 * loss
        tokens += batch[0].numel()
        if step % 100 == 0:
            seconds = time.time() - started
            print(f"{name}: step {step} loss {mean:.4f} {seconds:.0f} s {tokens / seconds:.0f} tokens/s", flush=True)


def first_round(model, tokenizer, args):
    rng, optimizers = teach_copying(model, tokenizer, args)
    rows = batches(tokenizer, rng, args.batch, args.steps, FIRST_ROUND, gently=True)
    teach_tasks(model, optimizers, rows, args.steps, "first round")


def second_round(model, tokenizer, args):
    """Half the learning rates, fresh optimizers."""
    rng, optimizers = random.Random(args.seed + 1), build_optimizers(model, args.lr / 2, args.muon_lr / 2)
    rows = batches(tokenizer, rng, args.batch, args.more_steps, SECOND_ROUND, gently=False)
    teach_tasks(model, optimizers, rows, args.more_steps, "second round", warmup=50)


@torch.no_grad()
def exact_match(model, tokenizer, rows):
    """Share of rows whose whole answer greedy decoding would write: every counted token is the most likely one."""
    right = 0
    for at in range(0, len(rows), 50):
        ids, labels = collate(rows[at : at + 50], tokenizer.pad_token_id)
        guess = model(input_ids=ids).logits[:, :-1].argmax(-1)
        right += ((guess == labels[:, 1:]) | (labels[:, 1:] == IGNORED)).all(1).sum().item()
    return right / len(rows)


def report(model, tokenizer, seed, count=100):
    rng = random.Random(seed)
    for task in SECOND_ROUND:
        rows = [encode_task(tokenizer, *task(rng)) for _ in range(count)]
        print(f"{task.__name__.removeprefix('task_'):12} exact match {exact_match(model, tokenizer, rows):.2f}")


def save(model, tokenizer, out):
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=256
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "base")
    parser.add_argument("--steps", type=int, default=3800, help="of the first round")
    parser.add_argument("--more-steps", type=int, default=1600, help="of the second round")
    parser.add_argument("--batch", type=int, default=32, help="rows a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")  # products in bfloat16 where the CPU has it, sums in float32
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    first_round(model, tokenizer, args)
    second_round(model, tokenizer, args)
    model.eval()
    report(model, tokenizer, args.seed + 2)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
