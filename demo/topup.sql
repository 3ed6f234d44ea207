-- Each account has an allowance that expires, and burns first, and has bought
-- a pack. Most have enough for the hour.

SELECT count(credit_lease.lease_topup(account, 'tokens', 20000, 'allowance:2026-03',
									  expires_at => now() + interval '30 days', priority => 10)) AS allowances,
	   count(credit_lease.lease_topup(account, 'tokens', 1000 * ceil(demand * (0.2 + 1.6 * luck) / 1000), 'pack:1')) AS packs
  FROM (SELECT account, sum(prompt_tokens + answer_limit), trace.draw(hashtext(account), 15)::numeric
		  FROM trace.request
		 GROUP BY account
		 ORDER BY account) AS a (account, demand, luck);
