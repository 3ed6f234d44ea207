# Prints what a client sends of some batches of events, and before the second and at the end for the clock and where the
# WAL is. A statement that ingests a batch answers how many were applied.

function clock() {
    print "SELECT extract(epoch FROM clock_timestamp()), pg_current_wal_insert_lsn() - '0/0';"
}

# The array literal of a column of the batch, or as many times the same
function array(column, value,    literal, i) {
    literal = column == "" ? value : event[column, 1]
    for (i = 2; i <= size; i++) literal = literal "," (column == "" ? value : event[column, i])
    return "'{" literal "}'"
}

function arrays() {
    return array("account") "," array("", "tokens") "," array("", 1) "," array("key")
}

function send(    i) {
    if (contender == "arrays")
        print "SELECT count(*) FILTER (WHERE applied) FROM credit_lease.lease_ingest(" arrays() ");"
    else if (contender == "insert")
        print "SELECT careful.ingest(" arrays() ");"
    else if (contender == "each")
        print "SELECT careful.each(" arrays() ");"
    else if (contender == "calls") {
        print "BEGIN;"
        for (i = 1; i <= size; i++)
            printf "EXECUTE call('%s', '%s');\n", event["account", i], event["key", i]
        print "COMMIT;"
    }
    else if (contender == "json") {
        printf "SELECT count(*) FILTER (WHERE applied) FROM credit_lease.lease_ingest('["
        for (i = 1; i <= size; i++)
            printf "%s{\"account\":\"%s\",\"credit\":\"tokens\",\"amount\":1,\"key\":\"%s\"}", (i > 1 ? "," : ""), event["account", i], event["key", i]
        print "]');"
    } else {
        # what lease_ingest() would have written
        print "COPY bare.copied (created_at, tranche_id, account, credit, kind, amount, available, idempotency_key, created_by) FROM STDIN;"
        for (i = 1; i <= size; i++)
            printf "2030-01-01 00:00:00.123456+00\t%d\t%s\ttokens\tconsume\t1\t999999999999\t%s\tpostgres\n", number[i], event["account", i], event["key", i]
        print "\\."
    }
}

BEGIN {
    srand(run)
    if (contender == "calls")
        print "PREPARE call AS SELECT FROM credit_lease.lease_consume($1, 'tokens', 1, $2);"
    # what a session loads and plans at its first batch is not measured
    for (batch = 0; batch <= batches; batch++) {
        for (i = 1; i <= size; i++) {
            number[i] = int(rand() * accounts) + 1
            event["account", i] = "acct:" number[i]
            event["key", i] = sprintf("%06d-%04d-%06d", run, batch, i)
        }
        if (batch == 1) clock()
        send()
    }
    clock()
}
