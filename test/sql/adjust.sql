--
-- lease_adjust: an operator corrects a pool, by a signed amount and for a
-- reason.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

-- Up: a new tranche that never expires.
SELECT amount, available, replayed FROM lease_adjust('adjust:1', 'tokens', 10, 'goodwill');
SELECT kind, granted, remaining, priority, expires_at FROM open_lease WHERE account = 'adjust:1';

-- Down: taken away in burn order (rule 10), and neither consumed nor expired.
SELECT available FROM lease_topup('adjust:1', 'tokens', 20, priority => 50);
SELECT amount, available, replayed
  FROM lease_adjust('adjust:1', 'tokens', -25, 'paid twice', 'ticket-9', '{"ticket": 9}');
SELECT priority, granted, remaining, consumed, expired, revoked FROM tranche WHERE account = 'adjust:1' ORDER BY tranche_id;
SELECT available, consumed, expired, granted FROM lease_balance('adjust:1');

-- The ledger has the sign, the reason and who it was.
SELECT kind, amount, available, reason, idempotency_key, metadata, created_by = session_user AS mine
  FROM ledger WHERE account = 'adjust:1' ORDER BY entry_id;

-- Nothing goes below zero (rule 1), and what is held is not taken away.
SELECT * FROM refused($$ SELECT lease_adjust('adjust:1', 'tokens', -6, 'too much') $$);
SELECT amount FROM lease_reserve('adjust:1', 'tokens', 2) \gset
SELECT * FROM refused($$ SELECT lease_adjust('adjust:1', 'tokens', -4, 'too much') $$);
SELECT amount, available FROM lease_adjust('adjust:1', 'tokens', -3, 'all that is left');
SELECT * FROM refused($$ SELECT lease_adjust('adjust:nobody', 'tokens', -1, 'too much') $$);

-- An adjustment is not a refund and cannot be refunded.
SELECT entry_id FROM lease_adjust('adjust:1', 'tokens', 1, 'goodwill') \gset
SELECT * FROM refused(format($$ SELECT lease_refund('adjust:1', %s) $$, :entry_id));

SELECT * FROM credit_lease.lease_verify();
