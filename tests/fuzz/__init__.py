"""Input at random: `judge` says what must hold for any, `samples` makes some, ``python -m tests.fuzz`` hunts."""
