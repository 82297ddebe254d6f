"""Access tokens, kept out of whatever is printed, written or published."""
import os
import re

# The Hugging Face hub's; of others the values that the environment holds
_PATTERN = re.compile(r'hf_(?:[a-z]+_)?[A-Za-z0-9]{20,}')
_VARIABLES = ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'WANDB_API_KEY')


def mask(text: str) -> str:
    """The text with three stars for each access token in it."""
    for value in filter(None, map(os.environ.get, _VARIABLES)):
        if len(value) >= 8:  # a shorter one is a placeholder, and might be any word
            text = text.replace(value, '***')
    return _PATTERN.sub('***', text)


def holds_token(text: str) -> bool:
    """Whether there is an access token in a text."""
    return mask(text) != text
