-- An hour of requests, busiest in its middle. Prompts and answers are
-- log-normal, about as long as those of hosted conversation models are.

INSERT INTO trace.loaded (at, prompt_tokens, answer_tokens)
SELECT timestamp '2026-03-02 14:00' + interval '1 hour' * (u + 0.09 * sin(2 * pi() * u)),
	   least(greatest(trace.draw_log_normal(n, 2, 800, 0.9), 8), 14000)::integer,
	   least(greatest(trace.draw_log_normal(n, 4, 140, 0.8), 1), 2000)::integer
  FROM generate_series(1, :requests) AS n,
	   LATERAL (SELECT trace.draw(n, 1)) AS d (u);
