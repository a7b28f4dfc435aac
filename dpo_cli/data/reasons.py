"""Every reason that a row is counted under: dropped, cut, or kept with a note."""

from __future__ import annotations

from collections.abc import Mapping

# Of rows that cannot be used; what data.on_bad_row speaks of. As the screen words them.
BAD_ROW: Mapping[str, str] = {
    "bad_json": "with invalid JSON",
    "missing_field": "with a missing field",
    "wrong_type": "with a field of the wrong type",
    "empty": "with an empty prompt or response",
    "invalid_utf8": "with invalid UTF-8",
    "no_prompt": "without a prompt",
    "many_turns": "whose response is more than one message",
    "too_few_responses": "with fewer than two responses",
    "template": "that the chat template cannot render",
    "unstable_template": "whose prompt or reply the chat template changes",
    "tokenizer": "that the tokenizer cannot take",
    "reference": "whose reference log-probs do not fit",
}
# All reasons, those of well-formed rows included.
REASONS: Mapping[str, str] = {
    **BAD_ROW,
    "identical": "with identical responses",
    "identical_after_cut": "with responses identical once cut",
    "tied": "whose responses are tied",
    "undesirable": "labelled undesirable",
    "too_long": "longer than {max_tokens:,} tokens",
    "prompt_too_long": "whose prompt alone exceeds {max_tokens:,} tokens",
    "prompt_cut": "whose prompt lost its beginning",
    "response_cut": "with a response cut short (no end token)",
    "boundary_shifted": "whose first response token reaches into the prompt's text",
    "text_after_stop": "with words after a stop token, which are not scored",
    "further_turns": "whose response goes on with further turns",
    "prompt_repeated": "whose response begins with the prompt's own text",
    "template_without_stop": "whose chat template does not end the reply; an end token was added",
    "tools_unused": "with tools, which plain text has no place for",
    "system_unused": "with a system message, which plain text has no place for (data.chat=true has)",
    "reference_unused": "whose reference log-probs this loss cannot use",
}
# What dpo-data finds in rows that were kept, or in the data as a whole.
FINDINGS: Mapping[str, str] = {
    "bad_rows": "that cannot be used; training would stop at the first (data.on_bad_row=error)",
    "contradictions": "whose verdict an earlier row of the same prompt contradicts",
    "overlap": "held out whose prompt is a training prompt, too",
    "near_overlap": "held out whose prompt nearly is a training prompt",
    "duplicates": "that say exactly what an earlier row says",
    "near_duplicates": "that nearly say what an earlier row says",
    "two_bos": "whose prompt begins with the BOS token twice",
    "unended": "with a response that no end token closes",
    "over_budget": "larger than tokens_per_microbatch, which go through the model alone",
}
