"""From preference data in any common form to token ids."""
