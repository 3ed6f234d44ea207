/*
 * upstream.c
 *		Upstreams: the billing APIs that credit is leased from. Each is a
 *		foreign server of the wrapper credit_lease, so that CREATE SERVER,
 *		CREATE USER MAPPING and GRANT USAGE administer it. The wrapper has no
 *		handler: there are no foreign tables.
 *
 * The validator refuses what must never be asked: a server says over the wire
 * whose key it was given, so nothing but https leaves this machine, and who
 * writes a URL or names a file must not reach more by it than he could himself.
 * No message repeats a value: it may have a secret in it.
 *
 * Takes no locks.
 */
#include "postgres.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/stat.h>
#include <unistd.h>

#include "access/reloptions.h"
#include "catalog/namespace.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "catalog/pg_user_mapping.h"
#include "commands/defrem.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/syscache.h"
#include "utils/varlena.h"

#include "compat.h"
#include "upstream.h"

#define WRAPPER	"credit_lease"

/* The longest URL, in bytes. */
#define MAX_URL	512

/* The longest that a dialect makes of it: a lease's id may be long, too. */
#define MAX_REQUEST_URL	4096

/* The longest API key, in bytes. */
#define MAX_KEY	4096

typedef struct Option
{
	const char *name;
	Oid			catalog;		/* of what it is an option */
	bool		required;
	void		(*check) (const char *name, const char *value);
} Option;

static void check_dialect(const char *name, const char *value);
static void check_url(const char *name, const char *value);
static void check_key_file(const char *name, const char *value);
static void check_supply(const char *name, const char *value);
static void check_usage(const char *name, const char *value);

static const Option options[] = {
	{"dialect", ForeignServerRelationId, true, check_dialect},
	{"url", ForeignServerRelationId, true, check_url},
	{"events_url", ForeignServerRelationId, false, check_url},
	{"supply", ForeignServerRelationId, false, check_supply},
	{"usage", ForeignServerRelationId, false, check_usage},
	{"api_key_file", UserMappingRelationId, true, check_key_file}
};

#define NOPTIONS	((int) lengthof(options))

/*
 * Returns one of the two functions that a dialect is, NAME_request and
 * NAME_outcome, InvalidOid if it is not there. A name without a schema is one
 * of the extension's own: nobody's search_path decides.
 */
static Oid
find_function(const char *dialect, const char *suffix, int nargs, const Oid *argtypes)
{
	List	   *names;
	char	   *name;
	Oid			function;

	if (!SplitIdentifierString(pstrdup(dialect), '.', &names) ||
		names == NIL || list_length(names) > 2)
		return InvalidOid;
	name = psprintf("%s_%s", (char *) llast(names), suffix);
	function = GetSysCacheOid3(PROCNAMEARGSNSP, Anum_pg_proc_oid,
							   CStringGetDatum(name),
							   PointerGetDatum(buildoidvector(argtypes, nargs)),
							   ObjectIdGetDatum(get_namespace_oid(list_length(names) == 2 ? linitial(names) : WRAPPER,
																  true)));
	return OidIsValid(function) && get_func_rettype(function) == JSONBOID ? function : InvalidOid;
}

static bool
find_dialect(const char *dialect, Oid *request_function, Oid *outcome_function)
{
	const Oid	argtypes[] = {TEXTOID, JSONBOID, INT4OID, JSONBOID};

	*request_function = find_function(dialect, "request", 2, argtypes);
	*outcome_function = find_function(dialect, "outcome", 4, argtypes);
	return OidIsValid(*request_function) && OidIsValid(*outcome_function);
}

static void
check_dialect(const char *name, const char *value)
{
	Oid			request_function;
	Oid			outcome_function;

	if (!find_dialect(value, &request_function, &outcome_function))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("unrecognized %s", name),
				 errhint("It is schematic, metronome, or the name of two functions of yours, schema.NAME_request(text, jsonb) and schema.NAME_outcome(text, jsonb, integer, jsonb), that return jsonb.")));
}

static const char *const supply_word[] = {"lease", "mirror"};
static const char *const usage_word[] = {"events", "cumulative"};

static void
check_word(const char *name, const char *value, const char *const *words)
{
	if (strcmp(value, words[0]) != 0 && strcmp(value, words[1]) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("unrecognized %s", name),
				 errhint("It is %s or %s.", words[0], words[1])));
}

static void
check_supply(const char *name, const char *value)
{
	check_word(name, value, supply_word);
}

static void
check_usage(const char *name, const char *value)
{
	check_word(name, value, usage_word);
}

/* Raises unless a dialect of the extension's own can do what is to be asked for by it. */
static void
require_supply(const char *dialect, const char *supply)
{
	bool		has_leases = strcmp(dialect, "schematic") == 0;
	bool		has_mirrors = strcmp(dialect, "metronome") == 0;

	if ((has_leases && strcmp(supply, "mirror") == 0) || (has_mirrors && strcmp(supply, "lease") == 0))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("dialect \"%s\" has no %s", dialect, has_leases ? "balances" : "leases"),
				 errhint("Leave option \"supply\" out.")));
}

pg_noreturn static void
bad_url(const char *name, const char *why)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("invalid URL in option \"%s\"", name),
			 errdetail("%s", why)));
}

static bool
is_loopback(const char *host)
{
	struct in_addr address;

	/* a whole dotted quad: names that only begin like one are names */
	if (inet_pton(AF_INET, host, &address) == 1)
		return ntohl(address.s_addr) >> 24 == 127;
	return pg_strcasecmp(host, "localhost") == 0;
}

/* Letters, digits and hyphens between single dots. */
static bool
is_host_name(const char *host)
{
	char		before = '.';

	for (const char *c = host; *c != '\0'; before = *c++)
	{
		if (*c == '.' ? before == '.' : (*c == '-' && before == '.'))
			return false;
		if (strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_", *c) == NULL)
			return false;
	}
	return *host != '\0';
}

/* Takes the brackets off an IPv6 address; returns what follows, NULL if it is none. */
static char *
end_address(char *host, bool *loopback)
{
	char	   *end = strchr(host, ']');
	struct in6_addr address;

	if (end == NULL)
		return NULL;
	*end = '\0';
	if (inet_pton(AF_INET6, host + 1, &address) != 1)
		return NULL;
	*loopback = IN6_IS_ADDR_LOOPBACK(&address);
	return end + 1;
}

static bool
is_port(const char *port)
{
	size_t		length = strlen(port);

	return length >= 1 && length <= 5 && strspn(port, "0123456789") == length &&
		atoi(port) >= 1 && atoi(port) <= 65535;
}

/*
 * Accepts https://host[:port][/path], and http where the host is this machine.
 * What could be read in two ways is refused, instead of being read in the way
 * that libcurl would.
 */
static void
check_url_of(const char *name, const char *value, int longest)
{
	char	   *host;
	char	   *rest;
	bool		plain;
	bool		loopback = false;

	if (strlen(value) > (size_t) longest)
		bad_url(name, psprintf("It must not be longer than %d bytes.", longest));
	for (const char *c = value; *c != '\0'; c++)
	{
		if (*c <= ' ' || *c > '~' || *c == '\\')
			bad_url(name, "It must be of ASCII characters, without spaces, control characters and backslashes.");
	}
	if (strpbrk(value, "?#") != NULL)
		bad_url(name, "It must not have a query or a fragment.");

	plain = pg_strncasecmp(value, "http://", strlen("http://")) == 0;
	if (!plain && pg_strncasecmp(value, "https://", strlen("https://")) != 0)
		bad_url(name, "It must begin with https://.");

	host = pstrdup(strstr(value, "//") + strlen("//"));
	host[strcspn(host, "/")] = '\0';
	if (strchr(host, '@') != NULL)
		bad_url(name, "It must not have credentials in it.");

	if (*host == '[')
	{
		rest = end_address(host, &loopback);
		if (rest == NULL || (*rest != ':' && *rest != '\0'))
			bad_url(name, "Its host is no IPv6 address.");
	}
	else
		rest = host + strcspn(host, ":");
	if (*rest == ':' && !is_port(rest + 1))
		bad_url(name, "Its port must be a number from 1 to 65535.");
	if (*host != '[')
	{
		*rest = '\0';
		if (!is_host_name(host))
			bad_url(name, "It must have the name or the address of a host.");
		loopback = is_loopback(host);
	}
	if (plain && !loopback)
		bad_url(name, "Without TLS it must be 127.0.0.0/8, [::1] or localhost.");
}

static void
check_url(const char *name, const char *value)
{
	check_url_of(name, value, MAX_URL);
}

/*
 * Whether the file is there, and who may read it, is seen when it is read: by
 * the server, not by whom this runs for.
 */
static void
check_key_file(const char *name, const char *value)
{
	if (!is_absolute_path(value))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must be an absolute path", name)));
	if (strlen(value) >= MAXPGPATH)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must be shorter than %d bytes", name, MAXPGPATH)));

	/* a key goes to the server's URL: whoever chose both could read any file by it */
	if (!has_privs_of_role(GetUserId(), ROLE_PG_READ_SERVER_FILES))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied to set option \"%s\"", name),
				 errdetail("Only roles with privileges of the \"%s\" role may set it.",
						   "pg_read_server_files")));
}

pg_noreturn static void
invalid_option(const char *name, Oid catalog)
{
	StringInfoData valid;

	initStringInfo(&valid);
	for (int i = 0; i < NOPTIONS; i++)
	{
		if (options[i].catalog == catalog)
			appendStringInfo(&valid, "%s%s", valid.len > 0 ? ", " : "", options[i].name);
	}
	ereport(ERROR,
			(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
			 errmsg("invalid option \"%s\"", name),
			 valid.len > 0 ?
			 errhint("Valid options in this context are: %s", valid.data) :
			 errhint("There are no valid options in this context.")));
}

static char *
find_option(List *options, const char *name)
{
	ListCell   *cell;

	foreach(cell, options)
	{
		DefElem    *def = lfirst_node(DefElem, cell);

		if (strcmp(def->defname, name) == 0)
			return defGetString(def);
	}
	return NULL;
}

/*
 * upstream_validator(options, catalog)
 *		Raises unless the options are those of an upstream or of a user mapping
 *		for one. Runs as whoever sets them, and is about his rights.
 */
PG_FUNCTION_INFO_V1(upstream_validator);
Datum
upstream_validator(PG_FUNCTION_ARGS)
{
	List	   *given = untransformRelOptions(PG_GETARG_DATUM(0));
	Oid			catalog = PG_GETARG_OID(1);
	bool		seen[NOPTIONS] = {false};
	char	   *dialect;
	char	   *supply;
	ListCell   *cell;

	foreach(cell, given)
	{
		DefElem    *def = lfirst_node(DefElem, cell);
		int			n = 0;

		while (n < NOPTIONS &&
			   (options[n].catalog != catalog || strcmp(options[n].name, def->defname) != 0))
			n++;
		if (n == NOPTIONS)
			invalid_option(def->defname, catalog);
		options[n].check(options[n].name, defGetString(def));
		seen[n] = true;
	}
	for (int i = 0; i < NOPTIONS; i++)
	{
		if (options[i].catalog == catalog && options[i].required && !seen[i])
			ereport(ERROR,
					(errcode(ERRCODE_FDW_DYNAMIC_PARAMETER_VALUE_NEEDED),
					 errmsg("option \"%s\" is required", options[i].name)));
	}
	dialect = find_option(given, "dialect");
	supply = find_option(given, "supply");
	if (dialect && supply)
		require_supply(dialect, supply);
	PG_RETURN_VOID();
}

/*
 * upstream_require
 *		Raises 42704 where there is no such server, and 42809 where it is of
 *		another wrapper.
 */
void
upstream_require(const char *server)
{
	ForeignServer *found = GetForeignServerByName(server, false);

	if (strcmp(GetForeignDataWrapper(found->fdwid)->fdwname, WRAPPER) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("server \"%s\" is not an upstream", server),
				 errhint("An upstream is a server of the foreign-data wrapper \"%s\".", WRAPPER)));
}

pg_noreturn static void
bad_key_file(const char *why)
{
	ereport(ERROR,
			(errcode(ERRCODE_CONFIG_FILE_ERROR),
			 errmsg("the API key file %s", why)));
}

/*
 * Reads an API key: one line of visible ASCII, so that it cannot end a header.
 * A file that others can read is refused, as a private key of the server is.
 */
static char *
read_key(const char *path)
{
	char		key[MAX_KEY + 2];
	struct stat status;
	ssize_t		length;
	int			file = OpenTransientFile(path, O_RDONLY | O_NONBLOCK | PG_BINARY);

	if (file < 0 || fstat(file, &status) != 0)
		bad_key_file(psprintf("could not be opened: %s", strerror(errno)));
	if (!S_ISREG(status.st_mode))
		bad_key_file("is not a regular file");
	if (status.st_mode & (S_IRWXG | S_IRWXO))
		bad_key_file("must not be accessible by group or others");
	length = read(file, key, sizeof(key) - 1);
	CloseTransientFile(file);
	if (length < 0)
		bad_key_file("could not be read");

	key[length] = '\0';
	key[strcspn(key, "\r\n")] = '\0';
	if (key[0] == '\0')
		bad_key_file("is empty");
	if (strlen(key) > MAX_KEY)
		bad_key_file("is too long");
	for (const char *c = key; *c != '\0'; c++)
	{
		if (*c <= ' ' || *c > '~')
			bad_key_file("must be one line of visible ASCII characters");
	}
	return pstrdup(key);
}

/*
 * upstream_load
 *		Returns an upstream as the role of this worker may use it, with its
 *		key, in the current memory context. Raises 42704 or 42809 where there is none,
 *		42501, F0000 for a key file that is of no use, and 22023 where the
 *		dialect is gone.
 */
Upstream *
upstream_load(const char *server)
{
	Upstream   *upstream = palloc0(sizeof(Upstream));
	ForeignServer *found;
	UserMapping *mapping;
	Oid			role = GetSessionUserId();

	upstream_require(server);
	found = GetForeignServerByName(server, false);
	if (object_aclcheck(ForeignServerRelationId, found->serverid, role, ACL_USAGE) != ACLCHECK_OK)
		aclcheck_error(ACLCHECK_NO_PRIV, OBJECT_FOREIGN_SERVER, server);
	mapping = GetUserMapping(role, found->serverid);

	upstream->owner = found->owner;
	upstream->url = find_option(found->options, "url");
	upstream->events_url = find_option(found->options, "events_url");
	if (!find_dialect(find_option(found->options, "dialect"),
					  &upstream->request_function, &upstream->outcome_function))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("the dialect of server \"%s\" is not there", server)));
	upstream->key = read_key(find_option(mapping->options, "api_key_file"));
	return upstream;
}

/* Raises 22023 unless what a dialect has made is a URL that may be asked. */
void
upstream_require_url(const char *url)
{
	check_url_of("url", url, MAX_REQUEST_URL);
}
