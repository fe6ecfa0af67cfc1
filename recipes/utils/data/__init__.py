"""JSONL files to rows with labels: exactly the answers, after exactly the prompt that inference sends."""

from recipes.utils.data.chats import Chat, DataOptions, Reading, held_out, read_chats, stream_chats
from recipes.utils.data.encode import Encoded, Encoder
from recipes.utils.data.prepare import Counts, Finding, Prepared, document_hash, fingerprint, locate, prepare
from recipes.utils.data.prepare import report_findings
from recipes.utils.data.shapes import BadRow
from recipes.utils.data.show import print_data, token_pieces
from recipes.utils.data.template import bounded, load_tokenizer, plain_template, prepends_blanks, read_tokenizer
