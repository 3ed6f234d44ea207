-- A chunk for each client, more than all runs can spend.
CREATE TABLE careful.chunk AS
	SELECT c.client, (SELECT l.chunk_id FROM credit_lease.lease_chunk_allocate('chunk:1', 'tokens', 1e9, 'client ' || c.client, '1 day') AS l) AS chunk_id
	  FROM generate_series(0, :clients - 1) AS c (client);
ALTER TABLE careful.chunk ADD PRIMARY KEY (client);
ANALYZE careful.chunk;
