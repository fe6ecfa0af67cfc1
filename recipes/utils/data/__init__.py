"""JSONL files to rows with labels: exactly the answers, after exactly the prompt that inference sends."""

from recipes.utils.data.chats import Chat, DataOptions, Reading, held_out, read_chats, stream_chats
from recipes.utils.data.encode import Encoded, Encoder
from recipes.utils.data.prepare import NEAR, Counts, Finding, Prepared, document_hash, fingerprint, fingerprint_text
from recipes.utils.data.prepare import locate, prepare, read_excluded, report_findings, signature, train_entries
from recipes.utils.data.prepare import train_paths, without_excluded
from recipes.utils.data.shapes import system_merged
from recipes.utils.data.template import bounded, load_tokenizer, plain_template, read_tokenizer, render
from recipes.utils.data.template import shipped_template
