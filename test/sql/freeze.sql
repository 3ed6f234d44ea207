--
-- lease_freeze and lease_unfreeze: a frozen pool takes credit in and gives
-- holds back; spending and holding are LC007.
--
SET search_path = credit_lease, test;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SET credit_lease.mock_now = '2030-01-01 00:00:00+00';

SELECT available FROM lease_topup('freeze:1', 'tokens', 100);
SELECT entry_id FROM lease_consume('freeze:1', 'tokens', 20, 'before') \gset
SELECT reservation_id AS held_1 FROM lease_reserve('freeze:1', 'tokens', 10, '1 hour') \gset
SELECT reservation_id AS held_2 FROM lease_reserve('freeze:1', 'tokens', 10, '1 hour') \gset
SELECT reservation_id AS held_3 FROM lease_reserve('freeze:1', 'tokens', 10, '1 hour') \gset

-- true where something changed.
SELECT lease_freeze('freeze:1', 'tokens', 'chargeback');
SELECT lease_freeze('freeze:1', 'tokens', 'another reason');
SELECT account, credit, reason, frozen_at, frozen_by = session_user AS mine FROM frozen_pool WHERE account = 'freeze:1';

-- No spending and no holding; DETAIL has the operator's reason.
SELECT * FROM refused($$ SELECT lease_consume('freeze:1', 'tokens', 1) $$);
SELECT * FROM refused($$ SELECT lease_reserve('freeze:1', 'tokens', 1) $$);
SELECT * FROM refused(format($$ SELECT lease_renew('freeze:1', %s, '2 hours') $$, :held_1));
SELECT * FROM refused(format($$ SELECT lease_renew('freeze:1', %s, add_amount => 1) $$, :held_1));
-- Not even where there would not be enough: it is for an operator, not for a top-up.
SELECT code FROM refusal($$ SELECT lease_consume('freeze:1', 'tokens', 1000) $$);

-- The twins answer instead, and change nothing.
SELECT applied, entry_id, amount, available, replayed FROM lease_try_consume('freeze:1', 'tokens', 1);
SELECT applied, reservation_id, amount, available, expires_at, replayed FROM lease_try_reserve('freeze:1', 'tokens', 1);
SELECT changed_by($$ SELECT lease_try_consume('freeze:1', 'tokens', 1, 'frozen-1') $$);
SELECT changed_by($$ SELECT lease_try_reserve('freeze:1', 'tokens', 1, '1 hour', 'frozen-2') $$);

-- What was done before is replayed.
SELECT applied, amount, replayed FROM lease_consume('freeze:1', 'tokens', 20, 'before');

-- Credit comes in, comes back, and is corrected both ways.
SELECT available FROM lease_topup('freeze:1', 'tokens', 50);
SELECT amount, available FROM lease_refund('freeze:1', :entry_id);
SELECT amount, available FROM lease_adjust('freeze:1', 'tokens', 5, 'goodwill');
SELECT amount, available FROM lease_adjust('freeze:1', 'tokens', -15, 'paid twice');
SELECT code FROM refusal($$ SELECT lease_adjust('freeze:1', 'tokens', -1000, 'too much') $$);

-- Holds end: they were set aside before. Above what it has held, a frozen pool
-- gives nothing.
SELECT lease_cancel('freeze:1', :held_1);
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('freeze:1', :held_2, 4);
SELECT reserved, consumed, refunded, shortfall, available FROM lease_settle('freeze:1', :held_3, 13);
SELECT available, reserved, consumed FROM lease_balance('freeze:1');

-- It is about one pool: the account's others go on.
SELECT available FROM lease_topup('freeze:1', 'images', 5);
SELECT applied, available FROM lease_consume('freeze:1', 'images', 1);

-- And it ends. Nothing of what was refused is remembered.
SELECT lease_unfreeze('freeze:1', 'tokens');
SELECT lease_unfreeze('freeze:1', 'tokens');
SELECT applied, available, replayed FROM lease_consume('freeze:1', 'tokens', 1, 'frozen-1');
SELECT applied, available, replayed FROM lease_reserve('freeze:1', 'tokens', 1, '1 hour', 'frozen-2');

-- Without a credit it is the whole account: the pools that are there, and
-- those that come later.
SELECT available FROM lease_topup('freeze:2', 'tokens', 10);
SELECT available FROM lease_topup('freeze:2', 'images', 10);
SELECT lease_freeze('freeze:2', reason => 'closed');
SELECT lease_freeze('freeze:2');
SELECT * FROM refused($$ SELECT lease_consume('freeze:2', 'tokens', 1) $$);
SELECT * FROM refused($$ SELECT lease_consume('freeze:2', 'images', 1) $$);
SELECT available FROM lease_topup('freeze:2', 'minutes', 10);
SELECT * FROM refused($$ SELECT lease_consume('freeze:2', 'minutes', 1) $$);
-- The freeze of an account is not lifted for one of its pools; a pool may be
-- frozen besides, for a reason of its own, and stays so ...
SELECT lease_unfreeze('freeze:2', 'tokens');
SELECT code FROM refusal($$ SELECT lease_consume('freeze:2', 'tokens', 1) $$);
SELECT lease_freeze('freeze:2', 'tokens', 'chargeback');
SELECT * FROM refused($$ SELECT lease_consume('freeze:2', 'tokens', 1) $$);
SELECT lease_unfreeze('freeze:2', 'tokens');
SELECT * FROM refused($$ SELECT lease_consume('freeze:2', 'tokens', 1) $$);
-- ... until every freeze of the account is lifted.
SELECT lease_freeze('freeze:2', 'tokens', 'chargeback');
SELECT lease_unfreeze('freeze:2');
SELECT lease_unfreeze('freeze:2');
SELECT credit, applied, available
  FROM (VALUES ('images'), ('minutes'), ('tokens')) v (credit), LATERAL lease_try_consume('freeze:2', credit, 1);

-- A pool may be frozen before it has any credit. What comes in is frozen.
SELECT lease_freeze('freeze:3', 'tokens', 'not yet');
SELECT code FROM refusal($$ SELECT lease_consume('freeze:3', 'tokens', 1) $$);
SELECT available FROM lease_topup('freeze:3', 'tokens', 10);
SELECT * FROM refused($$ SELECT lease_consume('freeze:3', 'tokens', 1) $$);
SELECT applied, available FROM lease_try_reserve('freeze:3', 'tokens', 1);
SELECT lease_unfreeze('freeze:3', 'tokens');
SELECT applied, available FROM lease_consume('freeze:3', 'tokens', 1);

-- A pool stays frozen when all that it had then has gone, and other credit
-- has come: by adjustment ...
SELECT available FROM lease_topup('freeze:4', 'tokens', 10);
SELECT lease_freeze('freeze:4', 'tokens', 'chargeback');
SELECT available FROM lease_topup('freeze:4', 'tokens', 7);
SELECT available FROM lease_adjust('freeze:4', 'tokens', -10, 'chargeback');
SELECT code FROM refusal($$ SELECT lease_consume('freeze:4', 'tokens', 1) $$);
-- ... by expiry ...
SELECT available FROM lease_topup('freeze:5', 'tokens', 10, expires_at => '2030-01-02');
SELECT lease_freeze('freeze:5', 'tokens', 'chargeback');
SELECT available FROM lease_topup('freeze:5', 'tokens', 7);
SET credit_lease.mock_now = '2030-01-02';
SELECT lease_reclaim() IS NOT NULL AS swept;
SELECT code FROM refusal($$ SELECT lease_consume('freeze:5', 'tokens', 1) $$);
SET credit_lease.mock_now = '2030-01-01';
-- ... by settlement ...
SELECT available FROM lease_topup('freeze:6', 'tokens', 10);
SELECT reservation_id FROM lease_reserve('freeze:6', 'tokens', 10) \gset
SELECT lease_freeze('freeze:6');
SELECT consumed FROM lease_settle('freeze:6', :reservation_id);
SELECT code FROM refusal($$ SELECT lease_consume('freeze:6', 'tokens', 1) $$);
SELECT available FROM lease_topup('freeze:6', 'tokens', 7);
SELECT code FROM refusal($$ SELECT lease_consume('freeze:6', 'tokens', 1) $$);
-- ... and when it is the refund of something older.
SELECT available FROM lease_topup('freeze:7', 'tokens', 10);
SELECT entry_id FROM lease_consume('freeze:7', 'tokens', 10) \gset
SELECT lease_freeze('freeze:7', 'tokens');
SELECT available FROM lease_refund('freeze:7', :entry_id);
SELECT * FROM refused($$ SELECT lease_consume('freeze:7', 'tokens', 1) $$);
-- None of it stays frozen afterwards.
SELECT account, lease_unfreeze(account) FROM (VALUES ('freeze:4'), ('freeze:5'), ('freeze:6'), ('freeze:7')) v (account);
SELECT account, applied, available
  FROM (VALUES ('freeze:4'), ('freeze:5'), ('freeze:6'), ('freeze:7')) v (account),
	   LATERAL lease_try_consume(account, 'tokens', 1);

SELECT * FROM credit_lease.lease_verify();
