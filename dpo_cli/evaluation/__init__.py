"""What dpo-sample and dpo-eval do: a policy is asked, or shown responses, and what comes out is written down."""
