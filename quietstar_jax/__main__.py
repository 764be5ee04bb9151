"""`python -m quietstar_jax COMMAND ...` is `quietstar COMMAND ...`."""

from quietstar_jax.commands import main

if __name__ == "__main__":
    main()
