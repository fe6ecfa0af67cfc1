"""What is unwise or wrong in data and settings, found before a GPU is paid for, each with its mend."""

import tempfile

from recipes.utils.config import Config
from recipes.utils.console import UserError, say
from recipes.utils.control_tokens import control_tokens
from recipes.utils.leakage import Finding, leave_out_copies, near_duplicates, sample
from recipes.utils.prepare import Prepared
from recipes.utils.run_table import steps_of

import torch
from transformers import AutoTokenizer

ROWS_COMPARED = 200  # of the user's own, against what inference sends


def heed(findings: list[Finding], config: Config) -> None:
    """Print the warnings, and keep them in `config` for the run's record; raise a `UserError` with what cannot be right."""
    config.findings += findings
    for finding in findings:
        if finding.level != "stop":
            say(f"{'left out' if finding.level == 'drop' else 'warning'}: {finding.message}")
    stops = [finding.message for finding in findings if finding.level == "stop"]
    if stops:
        raise UserError("\n".join(stops))


def check_rows(train: Prepared, validation: Prepared | None, config: Config, tokenizer) -> tuple[list, Prepared | None]:
    """Findings about the prepared rows, and the validation rows without those that are in training."""
    findings = []
    for part, prepared in (("train", train), ("validation", validation)):
        if prepared:
            findings += _lost_to_length(prepared.counts, part, config)
            findings += _marks(prepared, part, tokenizer)
    findings += _prompt_parity(train, config, tokenizer)
    if validation:
        leaked, validation = leave_out_copies(train, validation)
        findings += leaked + near_duplicates(config)
    return findings, validation


def check_model(model, rows, tokenizer) -> list[Finding]:
    """Control tokens of the rows whose embedding or head row looks untrained in the base, by its norm against the
    vocabulary's: a base model's chat tokens may never have been trained, and the head row decides when it stops."""
    sample = rows.select(range(min(len(rows), ROWS_COMPARED)))
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    read = special & {token for ids in sample["input_ids"] for token in ids}
    learnt = special & {label for labels in sample["labels"] for label in labels}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    findings = []
    for name, weight, used in (("embedding", embedding, read), ("head", head, learnt)):
        if name == "head" and head is embedding:  # tied, and told already
            continue
        norms = torch.linalg.vector_norm(weight.detach(), dim=-1, dtype=torch.float32)
        middle = norms.median().item()
        odd = [index for index in sorted(used) if norms[index] < middle / 3 or not torch.isfinite(norms[index])]
        if odd:
            named = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} (norm {norms[i]:.2g})" for i in odd)
            # a trained copy of the head in float32, its gradient, and Adam's two moments
            cost = head.numel() * 16 / 1e9
            findings.append(
                Finding(
                    "warn",
                    f"{named}: the {name} row looks untrained in this base (the vocabulary's median "
                    f"norm is {middle:.2g}), so the model may not learn to stop. Start from the Instruct "
                    f"model, or train the head: --lora.modules_to_save '[lm_head]' ({cost:.1f} GB more)",
                )
            )
    return findings


def check_settings(args, packed_rows: int, train: dict) -> list[Finding]:
    """Findings about settings that are fine each on their own: `args` is the SFTConfig, `packed_rows` the rows that the
    trainer draws from, `train` the counts of the train rows."""
    findings = []
    steps, steps_an_epoch = steps_of(args, packed_rows)
    if args.learning_rate < 5e-5:
        findings.append(
            Finding(
                "warn",
                f"learning rate {args.learning_rate:g} is one for full fine-tuning; an adapter learns "
                "little there: --training.learning_rate 2e-4",
            )
        )
    if args.get_warmup_steps(steps) >= steps > 1:
        findings.append(
            Finding(
                "warn",
                f"the warm-up of {args.get_warmup_steps(steps)} steps is as long as the run of "
                f"{steps}, so the learning rate is never reached: --training.warmup_steps 0.03",
            )
        )
    if steps < 100:
        rows = max(1, int(packed_rows * args.num_train_epochs / args.world_size) // 100)
        micro = min(rows, args.per_device_train_batch_size)
        flags = f"--training.per_device_train_batch_size {micro} --training.gradient_accumulation_steps {rows // micro}"
        flags += " --training.packing false" if rows == 1 and args.packing else ""
        flags = "--training.max_steps -1" if 0 < args.max_steps < 100 else flags
        findings.append(
            Finding(
                "warn",
                f"few steps: {steps}, each with {train['rows'] / steps_an_epoch:.1f} chats; an adapter "
                f"wants 100 or more. This gives more: {flags}",
            )
        )
    if args.save_strategy == "no":
        findings.append(
            Finding("warn", "no checkpoint is kept: a run that is stopped begins anew: --training.save_strategy steps")
        )
    return findings


def _lost_to_length(counts: dict, part: str, config: Config) -> list[Finding]:
    all_rows, limit = counts["rows"] + counts["dropped"], config.data.max_over_length
    rows, tokens = counts["over_length"] / all_rows, counts["lost_tokens"] / counts["all_tokens"]
    if max(rows, tokens) <= limit:
        return []
    return [
        Finding(
            "stop",
            f"{counts['over_length']:,} of {all_rows:,} {part} rows are over training.max_length "
            f"{config.training.get('max_length', 1024)}, and {tokens:.0%} of the tokens would be lost; 99 % of the rows "
            f"fit in --training.max_length {counts['length_99']}, or take the loss: --data.max_over_length 1.0",
        )
    ]


def _marks(prepared: Prepared, part: str, tokenizer) -> list[Finding]:
    counts, findings = prepared.counts, []
    if not counts["trained_tokens"]:
        findings.append(Finding("stop", f"no token of the {part} rows carries loss; the chat template marks no answer"))
    if counts["no_stop"]:
        findings.append(
            Finding(
                "stop",
                f"{counts['no_stop']:,} {part} rows have an answer whose last trained token ends no "
                "turn, so the model would never learn to stop: put the end-of-turn token inside the template's "
                "{% generation %} marks",
            )
        )
    if counts["trained_tokens"] == counts["tokens"]:
        findings.append(
            Finding("warn", f"every token of the {part} rows carries loss, prompts too; mark the answers alone")
        )
    first = prepared.rows[0]["input_ids"]
    if tokenizer.bos_token_id is not None and first[:2] == [tokenizer.bos_token_id] * 2:
        findings.append(
            Finding(
                "stop",
                f"{prepared.rows[0]['where']}: begins with {tokenizer.bos_token} twice; remove it from the "
                "text or from the chat template",
            )
        )
    return findings


def _prompt_parity(train: Prepared, config: Config, tokenizer) -> list[Finding]:
    """Each trained answer of the prepared rows must follow the very tokens that inference sends for it, through the
    tokenizer as it will be saved."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        served = AutoTokenizer.from_pretrained(folder)
    chats = {chat.where: chat for chat in sample(config, "train", ROWS_COMPARED)}
    typed = control_tokens(tokenizer).pattern
    for row in train.rows.select(range(min(len(train.rows), ROWS_COMPARED))):
        chat = chats.get(row["where"])
        if chat is None or typed.search(chat.line):
            continue  # not among the first rows; or escaped: a typed control token is real to a server that reads text
        prompts = [
            served.apply_chat_template(
                chat.messages[:index], tools=chat.tools, add_generation_prompt=True, return_dict=False
            )
            for index, message in enumerate(chat.messages)
            if message["role"] == "assistant"
        ]
        labels = row["labels"]
        starts = [place for place, label in enumerate(labels) if label != -100 and labels[place - 1] == -100]
        if any(row["input_ids"][:start] not in prompts for start in starts):
            return [
                Finding(
                    "stop",
                    f"{chat.where}: the training row does not begin with the tokens that inference sends for "
                    "its prompt; the chat template and the saved tokenizer do not agree",
                )
            ]
    return []
