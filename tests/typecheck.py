"""The type checker that every annotated function of the package runs under in the tests."""

from beartype import BeartypeConf, beartype

# An int where a float is asked for is fine in Python's type system (PEP 484), so it is here.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
