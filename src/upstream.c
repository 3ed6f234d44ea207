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
#include <netinet/in.h>

#include "access/reloptions.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_user_mapping.h"
#include "commands/defrem.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/acl.h"

#include "compat.h"
#include "upstream.h"

#define WRAPPER	"credit_lease"

/* The longest URL, in bytes. */
#define MAX_URL	512

static const char *const dialect_word[] = {"schematic", "metronome"};

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

static const Option options[] = {
	{"dialect", ForeignServerRelationId, true, check_dialect},
	{"url", ForeignServerRelationId, true, check_url},
	{"events_url", ForeignServerRelationId, false, check_url},
	{"api_key_file", UserMappingRelationId, true, check_key_file}
};

#define NOPTIONS	((int) lengthof(options))

static void
check_dialect(const char *name, const char *value)
{
	StringInfoData known;

	initStringInfo(&known);
	for (int i = 0; i < (int) lengthof(dialect_word); i++)
	{
		if (strcmp(value, dialect_word[i]) == 0)
			return;
		appendStringInfo(&known, "%s%s", i > 0 ? ", " : "", dialect_word[i]);
	}
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("unrecognized %s", name),
			 errhint("Known dialects are: %s.", known.data)));
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
check_url(const char *name, const char *value)
{
	char	   *host;
	char	   *rest;
	bool		plain;
	bool		loopback = false;

	if (strlen(value) > MAX_URL)
		bad_url(name, psprintf("It must not be longer than %d bytes.", MAX_URL));
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
