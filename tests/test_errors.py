"""The errors: what each carries, also from one process to another."""

import pickle

import pytest

from dropzone import (
    ConfigError,
    DataQualityError,
    DropzoneError,
    KeyReused,
    PayloadNotJson,
    ProcessorBusy,
    RawIdUnknown,
    StorageFull,
    StorageUnavailable,
)

ERRORS = [
    DropzoneError("a defect"),
    DropzoneError("the parameter x is wrong", "query_invalid", 400, parameter="x"),
    ConfigError("server.port is wrong"),
    PayloadNotJson("line 3: not JSON", line=3, position=17),
    RawIdUnknown("no payload has this raw_id"),
    KeyReused("this key came with another body before"),
    StorageUnavailable("the disk refuses"),
    StorageFull("the disk is full"),
    ProcessorBusy("another processor is at work"),
    DataQualityError("data_empty", "data is empty"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_errors_travel_between_processes(error: DropzoneError):
    """A pickled error arrives as the same class with the same text, code, status and members."""
    arrived = pickle.loads(pickle.dumps(error))  # noqa: S301 (we made it)

    assert type(arrived) is type(error)
    assert str(arrived) == str(error) == error.detail
    assert vars(arrived) == vars(error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_errors_say_what_they_answer(error: DropzoneError):
    """Every error has a code of lower-case words, an HTTP status that is an error, and a text."""
    assert error.code.replace("_", "").isalpha()
    assert error.code.islower()
    assert 400 <= error.status < 600
    assert error.detail
