"""Sells chats with a language model, to copy from. It needs psycopg 3 with its pool, and this table:

    CREATE TABLE chat (request text PRIMARY KEY, account text NOT NULL, reservation_id bigint,
                       expires_at timestamptz, tokens integer, answer text);

Whoever sends a request names it, and sends it again by the same name when he did not hear how it ended. Its row is
committed with the hold, and its answer with the charge, so that it finds what it has. No transaction is open while
the model works. The search_path has the table and credit_lease.
"""

import psycopg
import psycopg.rows
import psycopg_pool


class Denied(Exception):
    """Says why a request was not served."""


def connect(**options):
    return psycopg_pool.ConnectionPool(kwargs={'row_factory': psycopg.rows.namedtuple_row}, **options)


def transaction(pool, work, *args):
    """Does work in a transaction; once more when that has to be retried, or may have been committed for all we know."""
    try:
        with pool.connection() as conn:
            return work(conn, *args)
    except psycopg.OperationalError:  # a broken connection, 40001, 40P01
        with pool.connection() as conn:
            return work(conn, *args)


def begin(conn, request, account, most, ttl):
    """Returns the row of a request, with its answer, or with a hold of the most that it may cost."""
    row = conn.execute(
        'INSERT INTO chat (request, account) VALUES (%s, %s) ON CONFLICT (request) DO UPDATE SET request = chat.request'
        ' RETURNING *, expires_at > clock_timestamp() AS is_held', [request, account]).fetchone()
    if row.answer is not None or row.is_held:
        return row
    check = conn.execute("SELECT * FROM lease_check(%s, 'chat', %s, ttl => %s)", [account, most, ttl]).fetchone()
    if not check.allowed:
        raise Denied(check.reason)  # rolls back: sent again, the request is checked again
    return conn.execute('UPDATE chat SET reservation_id = %s, expires_at = %s WHERE request = %s RETURNING *',
                        [check.reservation_id, check.expires_at, request]).fetchone()


def finish(conn, row, tokens, answer):
    """Charges what was used, late if the hold has expired, and returns the answer: the first, if there are two."""
    update = conn.execute('UPDATE chat SET tokens = %s, answer = %s WHERE request = %s AND answer IS NULL',
                          [tokens, answer, row.request])
    if update.rowcount:
        conn.execute('SELECT lease_track(%s, %s, %s)', [row.account, row.reservation_id, tokens])
    return conn.execute('SELECT answer FROM chat WHERE request = %s', [row.request]).fetchone().answer


def give_up(conn, row):
    """Gives back what is held for a request of which nothing came."""
    conn.execute('SELECT lease_cancel(%s, %s)', [row.account, row.reservation_id])
    conn.execute('UPDATE chat SET reservation_id = NULL, expires_at = NULL WHERE request = %s AND answer IS NULL',
                 [row.request])


def serve(pool, model, request, account, prompt, limit=1000, ttl='1 minute'):
    """Returns the answer of the model, or raises Denied."""
    row = transaction(pool, begin, request, account, len(prompt) + limit, ttl)
    if row.answer is not None:
        return row.answer
    try:
        tokens, answer = model(request, prompt, limit)
    except Exception:
        transaction(pool, give_up, row)
        raise
    return transaction(pool, finish, row, tokens, answer)


def recover(pool, used):
    """Charges what the model's own log says of requests that nobody has finished in time, as after a crash."""
    with pool.connection() as conn:
        rows = conn.execute('SELECT * FROM chat WHERE answer IS NULL AND expires_at <= clock_timestamp()').fetchall()
    found = [row for row in rows if row.request in used]
    for row in found:
        transaction(pool, finish, row, *used[row.request])
    return len(found)
