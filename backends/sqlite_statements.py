"""What is asked of SQLite: the statements for either shape of the table."""

from dataclasses import dataclass

# Not STRICT: SQLite before 3.37 could not open the file.
CREATE_ONE = """
CREATE TABLE IF NOT EXISTS measurements (
    timestamp_utc TEXT NOT NULL PRIMARY KEY,
    mean REAL NOT NULL,
    std_dev REAL NOT NULL,
    raw_id TEXT NOT NULL
) WITHOUT ROWID
"""
CREATE_MANY = """
CREATE TABLE IF NOT EXISTS measurements (
    series TEXT NOT NULL,
    timestamp_utc TEXT NOT NULL,
    mean REAL NOT NULL,
    std_dev REAL NOT NULL,
    raw_id TEXT NOT NULL,
    PRIMARY KEY (series, timestamp_utc)
) WITHOUT ROWID
"""
# Reads of all series go through it: without, a page of them would sort all rows. With the numbers
# in it, a summary of 10,000,000 rows takes a tenth of the time.
CREATE_INDEX = """
CREATE INDEX IF NOT EXISTS measurements_by_time
ON measurements (timestamp_utc, series, mean, std_dev)
"""
# Rows of many series change many pages, again and again. So each connection keeps up to 16 MB of
# them, and they go back to the file when there are 64 MB of them beside it.
SETTINGS_OF_MANY = ("PRAGMA cache_size = -16384", "PRAGMA wal_autocheckpoint = 16384")
COLUMNS = 'SELECT name, type, "notnull", pk FROM pragma_table_info(?) ORDER BY cid'
VALUES = [("mean", "REAL", 1, 0), ("std_dev", "REAL", 1, 0), ("raw_id", "TEXT", 1, 0)]
COLUMNS_OF_ONE = [("timestamp_utc", "TEXT", 1, 1), *VALUES]
COLUMNS_OF_MANY = [("series", "TEXT", 1, 1), ("timestamp_utc", "TEXT", 1, 2), *VALUES]
# SQLite changes no primary key: the rows move to a new table, which takes the old one's name.
MOVE_TO_MANY = """
INSERT INTO measurements_new SELECT '', timestamp_utc, mean, std_dev, raw_id FROM measurements
"""
# Of a group, SQLite takes the columns of the row that has the greatest raw_id.
MOVE_TO_ONE = """
INSERT INTO measurements_new
SELECT timestamp_utc, mean, std_dev, max(raw_id) FROM measurements GROUP BY timestamp_utc
"""

# Most rows are new: what is not is looked at, and then upserted.
INSERT_ONE = """
INSERT INTO measurements (timestamp_utc, mean, std_dev, raw_id)
VALUES (?1, ?2, ?3, ?4) ON CONFLICT (timestamp_utc) DO NOTHING
"""
INSERT_MANY = """
INSERT INTO measurements (series, timestamp_utc, mean, std_dev, raw_id)
VALUES (?5, ?1, ?2, ?3, ?4) ON CONFLICT (series, timestamp_utc) DO NOTHING
"""
UPSERT_ONE = """
INSERT INTO measurements (timestamp_utc, mean, std_dev, raw_id)
VALUES (?1, ?2, ?3, ?4)
ON CONFLICT (timestamp_utc) DO UPDATE
SET mean = excluded.mean, std_dev = excluded.std_dev, raw_id = excluded.raw_id
WHERE excluded.raw_id >= measurements.raw_id
"""
UPSERT_MANY = """
INSERT INTO measurements (series, timestamp_utc, mean, std_dev, raw_id)
VALUES (?5, ?1, ?2, ?3, ?4)
ON CONFLICT (series, timestamp_utc) DO UPDATE
SET mean = excluded.mean, std_dev = excluded.std_dev, raw_id = excluded.raw_id
WHERE excluded.raw_id >= measurements.raw_id
"""
DELETE_ONE = "DELETE FROM measurements WHERE timestamp_utc = ?1 AND raw_id = ?4"
DELETE_MANY = "DELETE FROM measurements WHERE series = ?5 AND timestamp_utc = ?1 AND raw_id = ?4"
GET_ONE = "SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements WHERE timestamp_utc = ?1"
GET_MANY = """
SELECT timestamp_utc, mean, std_dev, raw_id, series FROM measurements
WHERE series = ?2 AND timestamp_utc = ?1
"""
# A year's first digit lies between the empty text and '~'.
FIND_ONE = """
SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements
WHERE timestamp_utc >= coalesce(?1, '') AND timestamp_utc < coalesce(?2, '~')
ORDER BY timestamp_utc ASC LIMIT ?3
"""
FIND_OF_SERIES = """
SELECT timestamp_utc, mean, std_dev, raw_id, series FROM measurements
WHERE timestamp_utc >= coalesce(?1, '') AND timestamp_utc < coalesce(?2, '~') AND series = ?4
ORDER BY timestamp_utc ASC LIMIT ?3
"""
FIND_OF_ALL = """
SELECT timestamp_utc, mean, std_dev, raw_id, series FROM measurements
WHERE (timestamp_utc, series) >= (coalesce(?1, ''), ?4)
    AND (timestamp_utc, series) < (coalesce(?2, '~'), ?5)
ORDER BY timestamp_utc ASC, series ASC LIMIT ?3
"""
COUNT = "SELECT count(*) FROM measurements"
COUNT_OF_SERIES = "SELECT count(*) FROM measurements WHERE series = ?"
# Of one span. Its ends are found by the index: to compare every text would take as long again.
SUMMARIZE = """
SELECT
    (SELECT timestamp_utc FROM measurements WHERE timestamp_utc >= ?1 AND timestamp_utc < ?2
        ORDER BY timestamp_utc ASC LIMIT 1),
    (SELECT timestamp_utc FROM measurements WHERE timestamp_utc >= ?1 AND timestamp_utc < ?2
        ORDER BY timestamp_utc DESC LIMIT 1),
    count(*), min(mean), max(mean), avg(mean), avg(std_dev)
FROM measurements WHERE timestamp_utc >= ?1 AND timestamp_utc < ?2
"""
SUMMARIZE_SERIES = SUMMARIZE.replace("WHERE", "WHERE series = ?3 AND")
# From name to name by the index, however many rows a series has.
SERIES = """
WITH RECURSIVE name (series) AS (
    SELECT min(series) FROM measurements WHERE series >= ?1
    UNION ALL
    SELECT (SELECT min(series) FROM measurements WHERE series > name.series)
    FROM name WHERE name.series IS NOT NULL
    LIMIT ?2
)
SELECT name.series,
    (SELECT max(timestamp_utc) FROM measurements WHERE measurements.series = name.series)
FROM name WHERE name.series IS NOT NULL
"""


def descending_of(find: str) -> str:
    """Return the statement that reads from the other end."""
    return find.replace(" ASC", " DESC")


def _in_one_line(*statements: str) -> str:
    return "; ".join(" ".join(statement.split()) for statement in statements)


def _change(create: str, move: str, *more: str) -> str:
    """Return the statements that change a table to another shape."""
    new = create.replace("IF NOT EXISTS measurements", "measurements_new")
    rename = "ALTER TABLE measurements_new RENAME TO measurements"
    drop = "DROP TABLE measurements"
    return _in_one_line("BEGIN IMMEDIATE", new, move, drop, rename, *more, "COMMIT")


@dataclass(frozen=True)
class Statements:
    """The statements for one shape of the table, and how to come to it from the other."""

    create: tuple[str, ...]
    columns: list[tuple[str, str, int, int]]
    insert: str
    upsert: str
    delete: str
    get: str
    change: str
    settings: tuple[str, ...] = ()  # of a connection

    @property
    def create_line(self) -> str:
        """The statements that make the table, to be shown."""
        return _in_one_line(*self.create)


ONE = Statements(
    create=(CREATE_ONE,),
    columns=COLUMNS_OF_ONE,
    insert=INSERT_ONE,
    upsert=UPSERT_ONE,
    delete=DELETE_ONE,
    get=GET_ONE,
    change=_change(CREATE_ONE, MOVE_TO_ONE),
)
MANY = Statements(
    create=(CREATE_MANY, CREATE_INDEX),
    columns=COLUMNS_OF_MANY,
    insert=INSERT_MANY,
    upsert=UPSERT_MANY,
    delete=DELETE_MANY,
    get=GET_MANY,
    change=_change(CREATE_MANY, MOVE_TO_MANY, CREATE_INDEX),
    settings=SETTINGS_OF_MANY,
)
