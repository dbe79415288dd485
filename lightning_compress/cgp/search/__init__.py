"""The search for circuits.

Reading order: `problem` (what is wanted), `settings`, `evolution` (phases, history, resuming), which begins with
`seeds` (built by `derivation`, put on the grid by `layout`) and goes on with `engine` and its `loops`; `reference` says
the same in plain Python, and `logs` sends a history to TensorBoard.
"""
