"""Graded tasks from a seed or a local file, text corpora, and the tokenizer trained on them."""

from .chat import ChatTask, read_chats
from .generators import KINDS, SPLITS, GradedTasks
from .task_set import Task, TaskSet, verify
from .text import TextCorpus
from .tokenizer import train_tokenizer
from .word_problems import load_gsm8k, load_svamp

# fmt: off
__all__ = [
    "KINDS", "SPLITS", "ChatTask", "GradedTasks", "Task", "TaskSet", "TextCorpus", "load_gsm8k",
    "load_svamp", "read_chats", "train_tokenizer", "verify",
]
# fmt: on
