-- Nobody tops anything up here: all credit is leased from the upstream, while
-- the first request of an account waits, and before it runs low from then on.
-- A token of a chat costs a token, and is reported as chat.tokens.

CREATE SERVER billing FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url :'upstream');
CREATE USER MAPPING FOR PUBLIC SERVER billing OPTIONS (api_key_file :'key');
INSERT INTO credit_lease.policy (credit, server, lease_size) VALUES ('tokens', 'billing', 20000);
INSERT INTO credit_lease.meter (feature, credit, rate, event) VALUES ('chat', 'tokens', 1, 'chat.tokens');
