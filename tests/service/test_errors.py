"""The errors: what each carries, also from one process to another."""

import pickle

import pytest

from backends import BackendError, BackendUnavailable, MeasurementNotFound
from backends.raw import (
    KeyReused,
    PayloadUnreadable,
    RawIdElsewhere,
    RawIdUnknown,
    StorageFull,
    StorageUnavailable,
)
from dropzone import (
    ConfigError,
    DataQualityError,
    DropzoneError,
    PayloadNotJson,
    ProcessorBusy,
    as_dropzone_error,
)

ERRORS = [
    DropzoneError("a defect"),
    DropzoneError("the parameter x is wrong", "query_invalid", 400, parameter="x"),
    ConfigError("server.port is wrong"),
    PayloadNotJson("line 3: not JSON", line=3, position=17),
    ProcessorBusy("another processor is at work"),
    DataQualityError("data_empty", "data is empty"),
]
ERRORS_BELOW = [
    (RawIdUnknown("no payload has this raw_id"), "raw_id_unknown", 404),
    (RawIdElsewhere("it is a payload of node 7", 7), "raw_id_elsewhere", 404),
    (KeyReused("this key came with another body before"), "idempotency_key_reused", 422),
    (StorageUnavailable("the disk refuses"), "storage_unavailable", 503),
    (StorageFull("the disk is full"), "storage_full", 503),
    (PayloadUnreadable("a bad block"), "storage_unavailable", 503),
    (BackendUnavailable("no answer"), "backend_unavailable", 503),
    (MeasurementNotFound("no row at this time"), "measurement_not_found", 404),
    (BackendError("the row is refused"), "backend_error", 500),
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


@pytest.mark.parametrize(("error", "code", "status"), ERRORS_BELOW, ids=str)
def test_errors_of_what_keeps_data(error: Exception, code: str, status: int):
    """An error of a row backend or the payload store is answered with its code and its words."""
    known = as_dropzone_error(error)

    assert (known.code, known.status, known.detail) == (code, status, str(error))


@pytest.mark.parametrize("error", [error for error, *_ in ERRORS_BELOW], ids=repr)
def test_errors_of_what_keeps_data_travel_between_processes(error: Exception):
    """They are pickled, too, when a worker process raises them."""
    arrived = pickle.loads(pickle.dumps(error))  # noqa: S301 (we made it)

    assert (type(arrived), str(arrived)) == (type(error), str(error))
