"""What is asked of PostgreSQL: the statements for either shape of the table, on one server or many.

A distributed PostgreSQL such as Citus refuses some of them with FeatureNotSupportedError, or reads
in the middle of a statement what that has just written: it gets a form that needs neither.
"""

from dataclasses import dataclass, replace

from backends import NO_PAYLOAD

CREATE_ONE = """
CREATE TABLE IF NOT EXISTS measurements (
    timestamp_utc timestamptz PRIMARY KEY,
    mean double precision NOT NULL,
    std_dev double precision NOT NULL,
    raw_id uuid NOT NULL
)
"""
# Series have one order everywhere, that of their code points.
CREATE_MANY = """
CREATE TABLE IF NOT EXISTS measurements (
    series text COLLATE "C" NOT NULL,
    timestamp_utc timestamptz NOT NULL,
    mean double precision NOT NULL,
    std_dev double precision NOT NULL,
    raw_id uuid NOT NULL,
    PRIMARY KEY (series, timestamp_utc)
)
"""
# Reads of all series go through it: without, a page of them would sort all rows.
CREATE_INDEX = """
CREATE INDEX IF NOT EXISTS measurements_by_time ON measurements (timestamp_utc, series COLLATE "C")
"""
COLUMNS_OF_ONE = "SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements LIMIT 0"
COLUMNS_OF_MANY = "SELECT timestamp_utc, mean, std_dev, raw_id, series FROM measurements LIMIT 0"
TYPES_OF_ONE = ["timestamptz", "float8", "float8", "uuid"]
TYPES_OF_MANY = [*TYPES_OF_ONE, "text"]
PRIMARY_KEY = """
SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE conrelid = to_regclass('measurements') AND contype = 'p'
"""
KEY_OF_ONE = "PRIMARY KEY (timestamp_utc)"
KEY_OF_MANY = "PRIMARY KEY (series, timestamp_utc)"
RAW_ID_COLUMN = "SELECT raw_id FROM measurements LIMIT 0"
SERIES_COLUMN = "SELECT series FROM measurements LIMIT 0"
# The rows so far are of the series "".
CHANGE_TO_MANY = """
BEGIN; ALTER TABLE measurements ADD COLUMN series text COLLATE "C" NOT NULL DEFAULT '',
    DROP CONSTRAINT {key}, ADD PRIMARY KEY (series, timestamp_utc);
ALTER TABLE measurements ALTER COLUMN series DROP DEFAULT;
CREATE INDEX IF NOT EXISTS measurements_by_time ON measurements (timestamp_utc, series COLLATE "C");
COMMIT
"""
# Of each timestamp the latest arrival stays; the key and the index go with their column.
CHANGE_TO_ONE = """
BEGIN; DELETE FROM measurements USING (
    SELECT series, timestamp_utc, row_number() OVER (
        PARTITION BY timestamp_utc ORDER BY raw_id DESC NULLS LAST, series DESC
    ) AS place FROM measurements
) AS ranked
WHERE ranked.place > 1 AND measurements.series = ranked.series
    AND measurements.timestamp_utc = ranked.timestamp_utc;
ALTER TABLE measurements DROP COLUMN series, ADD PRIMARY KEY (timestamp_utc); COMMIT
"""
# A table from before Dropzone has no raw_id. This one statement gives it one, and its rows that of
# no payload; rows that come without one are refused afterwards.
OLDER_COLUMNS = "SELECT timestamp_utc, mean, std_dev FROM measurements LIMIT 0"
TAKE_OVER = (
    f"ALTER TABLE measurements ADD COLUMN raw_id uuid NOT NULL DEFAULT '{NO_PAYLOAD}', "
    "ALTER COLUMN raw_id SET DEFAULT NULL"
)
# A default that makes raw_ids up lets rows win that no payload made.
DEFAULT = """
SELECT pg_get_expr(pg_attrdef.adbin, pg_attrdef.adrelid) FROM pg_attrdef
JOIN pg_attribute ON pg_attribute.attrelid = pg_attrdef.adrelid
    AND pg_attribute.attnum = pg_attrdef.adnum
WHERE pg_attrdef.adrelid = 'measurements'::regclass AND pg_attribute.attname = 'raw_id'
"""
FORGET_MADE_UP = (
    "ALTER TABLE measurements ALTER COLUMN raw_id SET DEFAULT NULL, ALTER COLUMN raw_id TYPE uuid "
    f"USING CASE substr(raw_id::text, 15, 1) WHEN '7' THEN raw_id ELSE '{NO_PAYLOAD}' END"
)

# ── Writing ───────────────────────────────────────────────────────────────────────────────────────

# Timestamps travel as text: asyncpg would write the first and the last possible one as infinities.
# A row without raw_id is older than Dropzone, and any payload's wins.
INSERT_ONE = """
INSERT INTO measurements (timestamp_utc, mean, std_dev, raw_id)
SELECT batch.timestamp_text::timestamptz, batch.mean, batch.std_dev, batch.raw_id
FROM unnest($1::text[], $2::double precision[], $3::double precision[], $4::uuid[])
    AS batch (timestamp_text, mean, std_dev, raw_id)
ORDER BY batch.timestamp_text::timestamptz
ON CONFLICT (timestamp_utc) DO
"""
INSERT_MANY = """
INSERT INTO measurements (timestamp_utc, mean, std_dev, raw_id, series)
SELECT batch.timestamp_text::timestamptz, batch.mean, batch.std_dev, batch.raw_id, batch.series
FROM unnest($1::text[], $2::double precision[], $3::double precision[], $4::uuid[], $5::text[])
    AS batch (timestamp_text, mean, std_dev, raw_id, series)
ORDER BY batch.series COLLATE "C", batch.timestamp_text::timestamptz
ON CONFLICT (series, timestamp_utc) DO
"""
UPDATE = """
UPDATE SET mean = excluded.mean, std_dev = excluded.std_dev, raw_id = excluded.raw_id
WHERE (excluded.raw_id >= measurements.raw_id) IS NOT FALSE
"""
BATCH_OF_ONE = """
FROM unnest($1::text[], $2::double precision[], $3::double precision[], $4::uuid[])
    AS batch (timestamp_text, mean, std_dev, raw_id)
JOIN measurements ON measurements.timestamp_utc = batch.timestamp_text::timestamptz
"""
BATCH_OF_MANY = """
FROM unnest($1::text[], $2::double precision[], $3::double precision[], $4::uuid[], $5::text[])
    AS batch (timestamp_text, mean, std_dev, raw_id, series)
JOIN measurements ON measurements.series = batch.series
    AND measurements.timestamp_utc = batch.timestamp_text::timestamptz
"""
ROWS_OF_ONE = """
SELECT measurements.timestamp_utc, measurements.mean, measurements.std_dev, measurements.raw_id
"""
ROWS_OF_MANY = f"{ROWS_OF_ONE.rstrip()}, measurements.series"
# Of the rows that stand there, those of other payloads.
OTHERS = "WHERE measurements.raw_id IS DISTINCT FROM batch.raw_id"
# The second part sees the table as it was when the statement began. Where all rows were new, it
# does not look at all. What another transaction wrote in between is not seen.
UPSERT = """
WITH upserted AS ({upsert} RETURNING xmax = 0 AS is_new)
{look} AND (SELECT count(*) FILTER (WHERE is_new) FROM upserted) < cardinality($1::text[])
"""
# Rows are locked in one order, that of upserts too, so that nobody waits in a circle.
DELETE_ONE = """
WITH named AS (
    SELECT measurements.timestamp_utc, batch.raw_id
    FROM unnest($1::text[], $2::uuid[]) AS batch (timestamp_text, raw_id)
    JOIN measurements ON measurements.timestamp_utc = batch.timestamp_text::timestamptz
        AND coalesce(measurements.raw_id, '00000000-0000-0000-0000-000000000000') = batch.raw_id
    ORDER BY measurements.timestamp_utc
    FOR UPDATE OF measurements
)
DELETE FROM measurements USING named
WHERE measurements.timestamp_utc = named.timestamp_utc
    AND coalesce(measurements.raw_id, '00000000-0000-0000-0000-000000000000') = named.raw_id
"""
DELETE_MANY = """
WITH named AS (
    SELECT measurements.series, measurements.timestamp_utc, batch.raw_id
    FROM unnest($1::text[], $2::uuid[], $3::text[]) AS batch (timestamp_text, raw_id, series)
    JOIN measurements ON measurements.series = batch.series
        AND measurements.timestamp_utc = batch.timestamp_text::timestamptz
        AND coalesce(measurements.raw_id, '00000000-0000-0000-0000-000000000000') = batch.raw_id
    ORDER BY measurements.series COLLATE "C", measurements.timestamp_utc
    FOR UPDATE OF measurements
)
DELETE FROM measurements USING named
WHERE measurements.series = named.series AND measurements.timestamp_utc = named.timestamp_utc
    AND coalesce(measurements.raw_id, '00000000-0000-0000-0000-000000000000') = named.raw_id
"""
# A distributed table locks rows on several servers in no order at all: a delete, which is rare,
# lets no other write run beside it.
LOCK = "LOCK TABLE measurements IN SHARE ROW EXCLUSIVE MODE"
DISTRIBUTED_DELETE_ONE = """
DELETE FROM measurements
USING unnest($1::text[]::timestamptz[], $2::uuid[]) AS batch (timestamp_utc, raw_id)
WHERE measurements.timestamp_utc = batch.timestamp_utc
    AND coalesce(measurements.raw_id, '00000000-0000-0000-0000-000000000000') = batch.raw_id
"""
DISTRIBUTED_DELETE_MANY = """
DELETE FROM measurements
USING unnest($1::text[]::timestamptz[], $2::uuid[], $3::text[])
    AS batch (timestamp_utc, raw_id, series)
WHERE measurements.series = batch.series AND measurements.timestamp_utc = batch.timestamp_utc
    AND coalesce(measurements.raw_id, '00000000-0000-0000-0000-000000000000') = batch.raw_id
"""

# ── Reading ───────────────────────────────────────────────────────────────────────────────────────

GET_ONE = """
SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements
WHERE timestamp_utc = $1::text::timestamptz
"""
GET_MANY = """
SELECT timestamp_utc, mean, std_dev, raw_id, series FROM measurements
WHERE series = $2 AND timestamp_utc = $1::text::timestamptz
"""
FIND_ONE = """
SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements
WHERE timestamp_utc >= coalesce($1, '-infinity')::timestamptz
    AND timestamp_utc < coalesce($2, 'infinity')::timestamptz
ORDER BY timestamp_utc ASC LIMIT $3
"""
FIND_OF_SERIES = """
SELECT timestamp_utc, mean, std_dev, raw_id, series FROM measurements
WHERE series = $4 AND timestamp_utc >= coalesce($1, '-infinity')::timestamptz
    AND timestamp_utc < coalesce($2, 'infinity')::timestamptz
ORDER BY timestamp_utc ASC LIMIT $3
"""
FIND_OF_ALL = """
SELECT timestamp_utc, mean, std_dev, raw_id, series FROM measurements
WHERE (timestamp_utc, series COLLATE "C") >= (coalesce($1, '-infinity')::timestamptz, $4::text)
    AND (timestamp_utc, series COLLATE "C") < (coalesce($2, 'infinity')::timestamptz, $5::text)
ORDER BY timestamp_utc ASC, series COLLATE "C" ASC LIMIT $3
"""
COUNT = "SELECT count(*) FROM measurements"
COUNT_OF_SERIES = "SELECT count(*) FROM measurements WHERE series = $1"
# A sum that overflows would be an error, and avg squares its values on the way.
SUMS = """
    min(timestamp_utc) AS first, max(timestamp_utc) AS last, count(*) AS count,
    min(mean) AS min_mean, max(mean) AS max_mean,
    sum(least(greatest(mean, -1e290), 1e290)) / count(*) AS mean,
    sum(least(std_dev, 1e290)) / count(*) AS std_dev
"""
# A range of the index for each span takes a fifth of the time of grouping all rows.
SUMMARIZE = """
SELECT of_span.first, of_span.last, of_span.count,
    of_span.min_mean, of_span.max_mean, of_span.mean, of_span.std_dev
FROM unnest($1::text[], $2::text[]) AS span (low, high)
CROSS JOIN LATERAL (
    SELECT SUMS
    FROM measurements
    WHERE timestamp_utc >= span.low::timestamptz AND timestamp_utc < span.high::timestamptz
) AS of_span
WHERE of_span.count > 0
ORDER BY of_span.first ASC
""".replace("SUMS", SUMS)
# The spans follow each other: where a row belongs is found among their beginnings.
DISTRIBUTED_SUMMARIZE = """
SELECT SUMS
FROM measurements
WHERE timestamp_utc >= ($1::text[])[1]::timestamptz
    AND timestamp_utc < ($2::text[])[cardinality($2::text[])]::timestamptz
GROUP BY width_bucket(timestamp_utc, $1::text[]::timestamptz[])
ORDER BY first ASC
""".replace("SUMS", SUMS)
# From name to name by the index, however many rows a series has.
SERIES = """
WITH RECURSIVE name (series) AS (
    (
        SELECT series COLLATE "C" FROM measurements WHERE series COLLATE "C" >= $1::text
        ORDER BY series COLLATE "C" LIMIT 1
    )
    UNION ALL
    SELECT following.series COLLATE "C" FROM name CROSS JOIN LATERAL (
        SELECT series FROM measurements WHERE series COLLATE "C" > name.series
        ORDER BY series COLLATE "C" LIMIT 1
    ) AS following
)
SELECT name.series, latest.timestamp_utc AS last FROM name CROSS JOIN LATERAL (
    SELECT timestamp_utc FROM measurements WHERE measurements.series = name.series
    ORDER BY timestamp_utc DESC LIMIT 1
) AS latest LIMIT $2
"""
DISTRIBUTED_SERIES = """
SELECT series, max(timestamp_utc) AS last FROM measurements
WHERE series COLLATE "C" >= $1::text
GROUP BY series ORDER BY series COLLATE "C" ASC LIMIT $2
"""
ALIVE = "SELECT 1"
PING = """
SELECT current_setting('transaction_read_only') AS read_only,
    to_regclass('measurements') IS NOT NULL AS table_is_there
"""


def in_one_line(*statements: str) -> str:
    """Return statements as they are shown."""
    return "; ".join(" ".join(statement.split()) for statement in statements)


def descending_of(find: str) -> str:
    """Return the statement that reads from the other end."""
    return find.replace(" ASC", " DESC")


def of_series(summarize: str) -> str:
    """Return the statement for one series alone, its name the third argument."""
    return summarize.replace("WHERE timestamp_utc", "WHERE series = $3 AND timestamp_utc")


@dataclass(frozen=True)
class Statements:
    """The statements for one shape of the table, on one server or, distributed, on many."""

    is_distributed: bool
    create: tuple[str, ...]
    columns: str
    types: list[str]
    look: str  # before an upsert, distributed alone
    upsert: str
    delete: str
    get: str
    summarize: str
    series: str

    @property
    def create_line(self) -> str:
        """The statements that make the table, to be shown."""
        return in_one_line(*self.create)


def _distributed(plain: Statements, insert: str, delete: str) -> Statements:
    return replace(
        plain,
        is_distributed=True,
        upsert=f"{insert.rstrip()} {UPDATE.strip()} RETURNING xmax = 0 AS is_new",
        delete=delete,
        summarize=DISTRIBUTED_SUMMARIZE,
        series=DISTRIBUTED_SERIES,
    )


ONE = Statements(
    is_distributed=False,
    create=(CREATE_ONE,),
    columns=COLUMNS_OF_ONE,
    types=TYPES_OF_ONE,
    look=f"{ROWS_OF_ONE}{BATCH_OF_ONE}{OTHERS}",
    upsert=UPSERT.format(
        upsert=f"{INSERT_ONE.rstrip()} {UPDATE.strip()}",
        look=f"{ROWS_OF_ONE}{BATCH_OF_ONE}{OTHERS}",
    ),
    delete=DELETE_ONE,
    get=GET_ONE,
    summarize=SUMMARIZE,
    series=SERIES,
)
MANY = Statements(
    is_distributed=False,
    create=(CREATE_MANY, CREATE_INDEX),
    columns=COLUMNS_OF_MANY,
    types=TYPES_OF_MANY,
    look=f"{ROWS_OF_MANY}{BATCH_OF_MANY}{OTHERS}",
    upsert=UPSERT.format(
        upsert=f"{INSERT_MANY.rstrip()} {UPDATE.strip()}",
        look=f"{ROWS_OF_MANY}{BATCH_OF_MANY}{OTHERS}",
    ),
    delete=DELETE_MANY,
    get=GET_MANY,
    summarize=SUMMARIZE,
    series=SERIES,
)
DISTRIBUTED_ONE = _distributed(ONE, INSERT_ONE, DISTRIBUTED_DELETE_ONE)
DISTRIBUTED_MANY = _distributed(MANY, INSERT_MANY, DISTRIBUTED_DELETE_MANY)
