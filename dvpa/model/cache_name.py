"""What Transformers calls the cache: `past_key_values` up to 5.23, `cache` from 5.24 on.

`forward` takes either; what we hand over to Transformers has the name it knows.
"""

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAME = next(
    field.name
    for field in fields(CausalLMOutputWithPast)
    if field.name in ("cache", "past_key_values")
)
