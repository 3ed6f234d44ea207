--
-- lease_cancel: a hold ends by being given back.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

SELECT available FROM lease_topup('cancel:1', 'tokens', 10);
SELECT available FROM lease_topup('cancel:1', 'tokens', 20);
SELECT reservation_id FROM lease_reserve('cancel:1', 'tokens', 25, '1 minute') \gset

-- Each part goes back to the tranche that it came from (rule 8).
SELECT lease_cancel('cancel:1', :reservation_id);
SELECT available, reserved, consumed, granted FROM lease_balance('cancel:1');
SELECT l.kind, l.amount, l.available, t.granted, t.reserved, t.remaining
  FROM ledger l JOIN tranche t USING (account, credit, tranche_id)
 WHERE l.account = 'cancel:1' AND l.kind = 'cancel' ORDER BY l.entry_id;
SELECT status, amount, consumed, refunded FROM reservation WHERE account = 'cancel:1';

-- Once is enough (rule 4): again is true, and nothing happens; also when the
-- hold would have expired since.
SELECT lease_cancel('cancel:1', :reservation_id);
SELECT changed_by(format($$ SELECT lease_cancel('cancel:1', %s) $$, :reservation_id));
SET credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT lease_cancel('cancel:1', :reservation_id);
SELECT status FROM reservation WHERE account = 'cancel:1';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

-- What was settled is not given back, and says so.
SELECT reservation_id FROM lease_reserve('cancel:1', 'tokens', 5) \gset
SELECT consumed FROM lease_settle('cancel:1', :reservation_id);
SELECT lease_cancel('cancel:1', :reservation_id);
SELECT changed_by(format($$ SELECT lease_cancel('cancel:1', %s) $$, :reservation_id));

-- Too late is no harm: the hold is given back all the same, as expired.
SELECT reservation_id FROM lease_reserve('cancel:1', 'tokens', 5, '1 minute') \gset
SET credit_lease.mock_now = '2030-01-01 00:01:00+00';
SELECT lease_cancel('cancel:1', :reservation_id);
SELECT r.status, l.kind, l.amount, l.available
  FROM reservation r JOIN ledger l USING (account, reservation_id)
 WHERE r.account = 'cancel:1' AND r.reservation_id = :reservation_id AND l.kind <> 'reserve';
SELECT lease_cancel('cancel:1', :reservation_id);
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

-- A reservation belongs to its account.
SELECT reservation_id FROM lease_reserve('cancel:1', 'tokens', 5) \gset
SELECT * FROM refused(format($$ SELECT lease_cancel('cancel:2', %s) $$, :reservation_id));
SELECT * FROM refused($$ SELECT lease_cancel('cancel:1', 0) $$);

SELECT * FROM credit_lease.lease_verify();
