-- What the upstream owes each account: an allowance and, for most, more than
-- enough for the hour.

SELECT account, 20000 + 1000 * ceil(demand * (0.2 + 1.6 * luck) / 1000)
  FROM (SELECT account, sum(prompt_tokens + answer_limit), trace.draw(hashtext(account), 15)::numeric
		  FROM trace.request
		 GROUP BY account
		 ORDER BY account) AS a (account, demand, luck);
