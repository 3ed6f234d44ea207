-- Says whose each request of the hour is, how much answer it asks for at most,
-- and how it ends.

-- The first account sends most of them, the k-th a k-th part of that.
WITH traffic AS (
	SELECT array_agg(share ORDER BY share) AS shares
	  FROM (SELECT sum(1.0 / k) OVER (ORDER BY k) / sum(1.0 / k) OVER () FROM generate_series(1, 300) AS k) AS s (share)
)
INSERT INTO trace.request
SELECT n, at, 'acct:' || 1 + width_bucket(trace.draw(n, 11)::numeric, shares),
	   prompt_tokens,
	   -- clients ask for round numbers, which few answers reach
	   greatest(answer_tokens, (ARRAY[256, 512, 1024, 2048])[1 + floor(4 * trace.draw(n, 12))::integer]),
	   answer_tokens,
	   CASE width_bucket(trace.draw(n, 13), ARRAY[0.02, 0.03]) WHEN 0 THEN 'failed' WHEN 1 THEN 'abandoned' ELSE 'served' END,
	   trace.draw(n, 14) < 0.01
  FROM traffic,
	   (SELECT row_number() OVER (ORDER BY at, prompt_tokens, answer_tokens), * FROM trace.loaded) AS t (n);
ANALYZE trace.request;
