"""The stages of a run: what each depends on and how it is built."""
