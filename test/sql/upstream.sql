--
-- Upstreams: what a foreign server and a user mapping may say, and who may say
-- it. No message repeats a value: it may have a secret in it.
--
SET search_path = credit_lease, test;

-- A dialect of somebody's own: two functions.
CREATE FUNCTION test.acme_request(operation text, request jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT request $$;
CREATE FUNCTION test.acme_outcome(operation text, request jsonb, status integer, reply jsonb) RETURNS jsonb
	LANGUAGE sql AS $$ SELECT reply $$;
CREATE FUNCTION test.half_request(operation text, request jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT request $$;
CREATE FUNCTION test.half_outcome(operation text, request jsonb, status integer, reply jsonb) RETURNS text
	LANGUAGE sql AS $$ SELECT reply::text $$;

-- What is right.
CREATE SERVER upstream FOREIGN DATA WRAPPER credit_lease
	OPTIONS (dialect 'schematic', url 'https://api.example.com', events_url 'https://events.example.com/v1/');
CREATE USER MAPPING FOR CURRENT_USER SERVER upstream OPTIONS (api_key_file '/etc/postgresql/billing.key');
ALTER SERVER upstream OPTIONS (SET dialect 'test.acme', DROP events_url);
CREATE SERVER plain FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'test.acme', url 'http://127.0.0.1:8080');
SELECT srvname, srvoptions FROM pg_foreign_server WHERE srvname IN ('upstream', 'plain') ORDER BY 1;

-- What has to be there.
SELECT code, message FROM refusal('CREATE SERVER s FOREIGN DATA WRAPPER credit_lease');
SELECT code, message FROM refusal($$ CREATE SERVER s FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic') $$);
SELECT code, message FROM refusal($$ CREATE SERVER s FOREIGN DATA WRAPPER credit_lease OPTIONS (url 'https://api.example.com') $$);
SELECT code, message FROM refusal('ALTER SERVER upstream OPTIONS (DROP url)');
SELECT code, message FROM refusal('CREATE USER MAPPING FOR PUBLIC SERVER upstream');
SELECT code, message FROM refusal('ALTER USER MAPPING FOR CURRENT_USER SERVER upstream OPTIONS (DROP api_key_file)');

-- What is unknown, or stands in the wrong place.
SELECT * FROM refused($$ ALTER SERVER upstream OPTIONS (api_key 'secret') $$);
SELECT * FROM refused($$ ALTER SERVER upstream OPTIONS (api_key_file '/secret') $$);
SELECT * FROM refused($$ ALTER SERVER upstream OPTIONS ("URL" 'secret') $$);
SELECT * FROM refused($$ CREATE USER MAPPING FOR PUBLIC SERVER upstream OPTIONS (api_key 'secret') $$);
SELECT * FROM refused($$ CREATE USER MAPPING FOR PUBLIC SERVER upstream OPTIONS (url 'https://api.example.com', api_key_file '/secret') $$);
SELECT * FROM refused($$ ALTER FOREIGN DATA WRAPPER credit_lease OPTIONS (url 'https://api.example.com') $$);
SELECT * FROM refused($$ ALTER FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic') $$);
SELECT * FROM refused($$ ALTER SERVER upstream OPTIONS (SET dialect 'secret') $$);
SELECT dialect, r.code FROM (VALUES ('"Schematic"'), (''), ('schematic,'), ('acme'), ('test.half'), ('test.acme.x'), ('nowhere.acme')) v (dialect),
	LATERAL refusal(format('ALTER SERVER upstream OPTIONS (SET dialect %L)', dialect)) r;

-- How it supplies pools, and is told of usage: where it does not say, its
-- dialect does.
CREATE SERVER mirrored FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'metronome', url 'https://api.example.com');
SELECT * FROM upstream WHERE server IN ('upstream', 'plain', 'mirrored') ORDER BY 1;
ALTER SERVER mirrored OPTIONS (supply 'mirror', usage 'cumulative');
ALTER SERVER plain OPTIONS (supply 'mirror', usage 'events');
SELECT * FROM upstream WHERE server IN ('upstream', 'plain', 'mirrored') ORDER BY 1;
SELECT * FROM refused($$ ALTER SERVER plain OPTIONS (SET supply 'secret') $$);
SELECT * FROM refused($$ ALTER SERVER plain OPTIONS (SET usage '') $$);
SELECT * FROM refused($$ ALTER SERVER mirrored OPTIONS (SET supply 'lease') $$);
SELECT * FROM refused($$ ALTER SERVER plain OPTIONS (SET dialect 'schematic') $$);
SELECT * FROM refused($$ CREATE USER MAPPING FOR PUBLIC SERVER plain OPTIONS (supply 'mirror', api_key_file '/secret') $$);
ALTER SERVER plain OPTIONS (DROP supply, DROP usage);
DROP SERVER mirrored;

-- A key's file has an absolute path; that it is not there is seen later.
SELECT path, r.code, r.message FROM (VALUES ('billing.key'), (''), ('./billing.key'), ('~/billing.key')) v (path),
	LATERAL refusal(format('ALTER USER MAPPING FOR CURRENT_USER SERVER upstream OPTIONS (SET api_key_file %L)', path)) r;
SELECT code, message FROM refusal(format('ALTER USER MAPPING FOR CURRENT_USER SERVER upstream OPTIONS (SET api_key_file %L)', '/' || repeat('x', 1023)));
ALTER USER MAPPING FOR CURRENT_USER SERVER upstream OPTIONS (SET api_key_file '/nowhere');

-- URLs.
SELECT url, r.code, r.detail FROM (VALUES
	(1, 'https://api.example.com'),
	(2, 'HTTPS://API.example.com.:443/v1/a%20b/'),
	(3, 'https://203.0.113.1:65535'),
	(4, 'https://[2001:db8::1]:8443/v1'),
	(5, 'https://xn--bcher-kva.example'),
	(6, 'https://api.example.com/@v1'),
	(7, 'http://localhost'),
	(8, 'http://LocalHost:1/v1'),
	(9, 'http://127.0.0.1/v1'),
	(10, 'http://127.255.255.254:65535'),
	(11, 'http://[::1]'),
	(12, 'http://[::1]:8080/v1'),
	(13, 'http://[0:0:0:0:0:0:0:1]/'),
	-- not https
	(20, ''),
	(21, 'api.example.com'),
	(22, '//api.example.com'),
	(23, 'https:/api.example.com'),
	(24, 'https:api.example.com'),
	(25, 'ftp://api.example.com'),
	(26, 'file:///etc/passwd'),
	(27, 'javascript://localhost'),
	(28, 'httpss://api.example.com'),
	-- http, and not to this machine
	(30, 'http://api.example.com'),
	(31, 'http://localhost.evil.com'),
	(32, 'http://localhost.'),
	(33, 'http://127.0.0.1.evil.com'),
	(34, 'http://127.0.0.1.'),
	(35, 'http://128.0.0.1'),
	(36, 'http://126.255.255.255'),
	(37, 'http://0.0.0.0'),
	(38, 'http://10.0.0.1'),
	(39, 'http://127.1'),
	(40, 'http://2130706433'),
	(41, 'http://0x7f.0.0.1'),
	(42, 'http://0177.0.0.1'),
	(43, 'http://[::]'),
	(44, 'http://[::2]'),
	(45, 'http://[::ffff:127.0.0.1]'),
	(46, 'http://evil-localhost'),
	-- credentials
	(50, 'https://user:secret@api.example.com'),
	(51, 'https://secret@api.example.com'),
	(52, 'https://@api.example.com'),
	(53, 'http://127.0.0.1@evil.com'),
	(54, 'http://127.0.0.1:80@evil.com'),
	(55, 'http://[::1]@evil.com'),
	(56, 'http://localhost%40evil.com'),
	-- a query or a fragment
	(60, 'https://api.example.com?key=secret'),
	(61, 'https://api.example.com/v1?'),
	(62, 'https://api.example.com#secret'),
	(63, 'http://127.0.0.1#@evil.com'),
	(64, 'http://127.0.0.1?@evil.com'),
	-- characters that are read in more than one way
	(70, E'http://127.0.0.1\\@evil.com'),
	(71, E'http://127.0.0.1\\.evil.com'),
	(72, E'https:\\\\api.example.com'),
	(73, 'https://api.example.com/a b'),
	(74, ' https://api.example.com'),
	(75, 'https://api.example.com '),
	(76, E'https://api.example.com\n'),
	(77, E'https://api.example.com/\tv1'),
	(78, E'https://api.example.com\r\nX-Header: secret'),
	(79, E'https://api.example.com\x7f'),
	-- no host, or no good one
	(80, 'https://'),
	(81, 'https:///v1'),
	(82, 'https://:443'),
	(83, 'https://.example.com'),
	(84, 'https://api..example.com'),
	(85, 'https://-api.example.com'),
	(86, 'https://api.example.com,evil.com'),
	(87, 'https://api.exa%6dple.com'),
	(88, 'https://[2001:db8::1'),
	(89, 'https://[2001:db8::1]evil.com'),
	(90, 'https://[fe80::1%25eth0]'),
	(91, 'https://[]'),
	(92, 'https://2001:db8::1'),
	-- no good port
	(100, 'https://api.example.com:'),
	(101, 'https://api.example.com:0'),
	(102, 'https://api.example.com:65536'),
	(103, 'https://api.example.com:443443'),
	(104, 'https://api.example.com:-1'),
	(105, 'https://api.example.com:443:443'),
	(106, 'https://api.example.com:https'),
	(107, 'http://127.0.0.1:80.evil.com')
  ) v (n, url), LATERAL refusal(format('ALTER SERVER plain OPTIONS (SET url %L)', url)) r
 ORDER BY n;
SELECT code, message, detail FROM refusal(format('ALTER SERVER plain OPTIONS (SET url %L)', 'https://' || repeat('x', 505)));
SELECT code FROM refusal(format('ALTER SERVER plain OPTIONS (SET url %L)', 'https://' || repeat('x', 504)));
SELECT code, detail FROM refusal(format('ALTER SERVER plain OPTIONS (SET url %L)', 'https://b' || convert_from('\xc3bc', getdatabaseencoding()) || 'cher.example'));
-- events_url is no different
SELECT code, message, detail FROM refusal($$ ALTER SERVER upstream OPTIONS (events_url 'http://user:secret@127.0.0.1') $$);
SELECT code FROM refusal($$ ALTER SERVER upstream OPTIONS (events_url 'http://127.0.0.1') $$);

-- No message has a secret in it.
SELECT count(*) AS leaks FROM (VALUES
	('url', 'https://user:hunter2@api.example.com'), ('url', 'https://api.example.com?key=hunter2'), ('url', 'hunter2'),
	('dialect', 'hunter2')) v (name, value),
	LATERAL refusal(format('ALTER SERVER upstream OPTIONS (SET %I %L)', name, value)) r
 WHERE r.code = 'none' OR concat(r.message, r.detail, r.hint) LIKE '%hunter2%';

-- There is nothing to read from it.
CREATE FOREIGN TABLE upstream_table (n integer) SERVER upstream;
SELECT * FROM upstream_table;
DROP FOREIGN TABLE upstream_table;

--
-- Whoever has USAGE on the wrapper makes a server. To name a file that the
-- server reads takes more: its contents go to the server's URL.
--
CREATE ROLE regress_credit_lease_maker;
CREATE ROLE regress_credit_lease_user;
SET ROLE regress_credit_lease_maker;
CREATE SERVER made FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://evil.example');
RESET ROLE;
GRANT USAGE ON FOREIGN DATA WRAPPER credit_lease TO regress_credit_lease_maker;
SET ROLE regress_credit_lease_maker;
CREATE SERVER made FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'https://evil.example');
CREATE SERVER made_too FOREIGN DATA WRAPPER credit_lease OPTIONS (dialect 'schematic', url 'http://evil.example');
CREATE USER MAPPING FOR regress_credit_lease_maker SERVER made OPTIONS (api_key_file '/etc/ssl/private/server.key');
SELECT credit_lease.upstream_validator('{}', 0);
RESET ROLE;
GRANT pg_read_server_files TO regress_credit_lease_maker;
SET ROLE regress_credit_lease_maker;
CREATE USER MAPPING FOR regress_credit_lease_user SERVER made OPTIONS (api_key_file '/etc/ssl/private/server.key');
GRANT USAGE ON FOREIGN SERVER made TO regress_credit_lease_user;
RESET ROLE;
-- who may use a server cannot point its mapping elsewhere
SET ROLE regress_credit_lease_user;
ALTER USER MAPPING FOR regress_credit_lease_user SERVER made OPTIONS (SET api_key_file '/etc/passwd');
RESET ROLE;

SET client_min_messages = warning;
DROP SERVER upstream, plain, made CASCADE;
DROP FUNCTION test.acme_request, test.acme_outcome, test.half_request, test.half_outcome;
RESET client_min_messages;
REVOKE pg_read_server_files FROM regress_credit_lease_maker;
DROP OWNED BY regress_credit_lease_maker, regress_credit_lease_user;
DROP ROLE regress_credit_lease_maker, regress_credit_lease_user;
