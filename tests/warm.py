"""For launch.py: what every script would read again after it is forked."""

import tokenizer

tokenizer.read_merges(tokenizer.VOCABULARY)
