/*
 * http.c
 *		The HTTP client of the background worker: requests that run side by
 *		side while the worker waits for them and for its latch at once.
 *
 * Requests are libcurl transfers of one multi handle. libcurl tells by
 * callbacks which sockets and which timer it waits for; http_wait() puts them
 * into a WaitEventSet next to the latch, and hands back to libcurl what has
 * happened. Nothing proceeds outside of http_wait(). No locks are taken here,
 * and none should be held, nor a transaction be open, while a network is
 * waited for.
 *
 * No error is raised through libcurl's frames: the callbacks allocate nothing
 * with palloc, call nothing of the server's that could, and report a failure
 * by what they return. Errors are raised between calls of libcurl only, and
 * every transfer is on a list from before it can fail, so that
 * http_forget_all() finds it.
 *
 * libcurl may start threads, to resolve names. The server's signal handlers
 * must run in none of them, and a thread inherits the mask of signals of who
 * starts it: all signals are blocked while libcurl has control. It returns
 * without waiting for the network, so they are not blocked for long. SIGPIPE
 * is ignored by the server everywhere.
 *
 * A connection that was kept may turn out to be closed only after a request
 * was sent on it. libcurl then sends that request again on a new one, so it
 * may arrive twice: requests must be such that this does no harm.
 */
#include "postgres.h"

#include <curl/curl.h>
#include <signal.h>

#include "lib/ilist.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "storage/latch.h"
#include "utils/memutils.h"
#include "utils/wait_event.h"

#include "compat.h"
#include "http.h"

#if LIBCURL_VERSION_NUM < 0x075700
#error "libcurl 7.87 or later is required"
#endif

/* No upstream has reason to answer with more; in bytes. */
#define MAX_BODY	(256 * 1024)
#define MAX_HEADERS	(64 * 1024)

/* How many events one wait takes; what is left over comes with the next. */
#define MAX_EVENTS	64

#define NEVER		PG_INT64_MAX

/* A request, from http_send() until its reply has been taken. */
typedef struct Transfer
{
	dlist_node	node;
	void	   *owner;
	CURL	   *easy;
	struct curl_slist *headers;
	CURLcode	result;			/* once it has ended */
	const char *refusal;		/* why a callback has ended it, or NULL */
	size_t		header_length;
	size_t		reply_length;
	char		reply[MAX_BODY];	/* of full size, so that no callback allocates */
	char		body[FLEXIBLE_ARRAY_MEMBER];	/* which libcurl does not copy */
} Transfer;

/* A socket that libcurl waits for. */
typedef struct Watch
{
	curl_socket_t socket;
	int			events;			/* WL_SOCKET_* */
} Watch;

static CURLM *multi;
static dlist_head running = DLIST_STATIC_INIT(running);
static dlist_head ended = DLIST_STATIC_INIT(ended);
static int	in_flight;

/* What libcurl waits for, kept by its callbacks. The array is malloc'ed. */
static Watch *watches;
static int	nwatches;
static int	max_watches;
static int64 timer_at = NEVER;

/* Microseconds of a clock that is never set. */
static int64
now_us(void)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	return (int64) INSTR_TIME_GET_MICROSEC(now);
}

/* Blocks all signals, SIGQUIT too, which PostgreSQL's own mask leaves out. */
static sigset_t
block_signals(void)
{
	sigset_t	all;
	sigset_t	saved;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &saved);
	return saved;
}

static void
restore_signals(sigset_t saved)
{
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
}

/* A callback of libcurl: what is to be waited for at a socket has changed. */
static int
watch_socket(CURL *easy, curl_socket_t socket, int what, void *arg, void *socket_arg)
{
	int			events = 0;
	int			i = 0;

	if (what == CURL_POLL_IN || what == CURL_POLL_INOUT)
		events |= WL_SOCKET_READABLE;
	if (what == CURL_POLL_OUT || what == CURL_POLL_INOUT)
		events |= WL_SOCKET_WRITEABLE;

	while (i < nwatches && watches[i].socket != socket)
		i++;
	if (events == 0)
	{
		if (i < nwatches)
			watches[i] = watches[--nwatches];
		return 0;
	}
	if (i == max_watches)
	{
		int			more = Max(16, 2 * max_watches);
		Watch	   *larger = realloc(watches, more * sizeof(Watch));

		if (larger == NULL)
			return -1;
		watches = larger;
		max_watches = more;
	}
	if (i == nwatches)
		nwatches++;
	watches[i].socket = socket;
	watches[i].events = events;
	return 0;
}

/* A callback of libcurl: it wants to be called after a time, once, or not (-1). */
static int
set_timer(CURLM *handle, long timeout_ms, void *arg)
{
	timer_at = timeout_ms < 0 ? NEVER : now_us() + timeout_ms * INT64CONST(1000);
	return 0;
}

/* A callback of libcurl: a part of the body has come. */
static size_t
take_body(char *data, size_t size, size_t n, void *arg)
{
	Transfer   *transfer = arg;
	size_t		length = size * n;

	if (length > MAX_BODY - transfer->reply_length)
	{
		transfer->refusal = "the reply is longer than 256 kB";
		return CURL_WRITEFUNC_ERROR;
	}
	memcpy(transfer->reply + transfer->reply_length, data, length);
	transfer->reply_length += length;
	return length;
}

/* A callback of libcurl: a line of headers has come, or of what follows a chunked body. */
static size_t
take_header(char *data, size_t size, size_t n, void *arg)
{
	Transfer   *transfer = arg;
	size_t		length = size * n;

	if (length > MAX_HEADERS - transfer->header_length)
	{
		transfer->refusal = "the headers of the reply are longer than 64 kB";
		return CURL_WRITEFUNC_ERROR;
	}
	transfer->header_length += length;
	return length;
}

/* Returns why there is no complete reply; none of these tells what was sent, or where. */
static const char *
reason(const Transfer *transfer)
{
	if (transfer->refusal)
		return transfer->refusal;
	switch (transfer->result)
	{
		case CURLE_URL_MALFORMAT:
			return "the URL is malformed";
		case CURLE_COULDNT_RESOLVE_HOST:
			return "could not resolve the host";
		case CURLE_COULDNT_RESOLVE_PROXY:
			return "could not resolve the proxy";
		case CURLE_COULDNT_CONNECT:
			return "could not connect";
		case CURLE_OPERATION_TIMEDOUT:
			return "timed out";
		case CURLE_SSL_CONNECT_ERROR:
			return "could not agree on TLS";
		case CURLE_PEER_FAILED_VERIFICATION:
			return "the certificate is not trusted";
		case CURLE_SSL_CACERT_BADFILE:
			return "could not read the trusted certificates";
		case CURLE_SEND_ERROR:
		case CURLE_RECV_ERROR:
		case CURLE_GOT_NOTHING:
			return "the connection was closed";
		case CURLE_PARTIAL_FILE:
			return "the reply was cut short";
		case CURLE_UNSUPPORTED_PROTOCOL:
		case CURLE_WEIRD_SERVER_REPLY:
			return "the other side does not speak HTTP";
		case CURLE_OUT_OF_MEMORY:
			return "out of memory";
		default:
			return curl_easy_strerror(transfer->result);
	}
}

/* Ends a transfer in whatever state it is, and wipes what may be secret. */
static void
forget(Transfer *transfer)
{
	sigset_t	saved = block_signals();

	if (transfer->easy)
	{
		curl_multi_remove_handle(multi, transfer->easy);
		curl_easy_cleanup(transfer->easy);
	}
	for (struct curl_slist *header = transfer->headers; header; header = header->next)
		explicit_bzero(header->data, strlen(header->data));
	curl_slist_free_all(transfer->headers);
	restore_signals(saved);

	dlist_delete(&transfer->node);
	in_flight--;
	explicit_bzero(transfer->body, strlen(transfer->body));
	pfree(transfer);
}

/*
 * http_begin
 *		Makes requests possible; to be called once, in the worker itself,
 *		since nothing of libcurl's survives a fork.
 */
void
http_begin(void)
{
	sigset_t	saved = block_signals();

	if (curl_global_init(CURL_GLOBAL_DEFAULT) == CURLE_OK)
		multi = curl_multi_init();
	restore_signals(saved);

	if (multi == NULL ||
		curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, watch_socket) != CURLM_OK ||
		curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, set_timer) != CURLM_OK)
		ereport(ERROR,
				(errcode(ERRCODE_EXTERNAL_ROUTINE_EXCEPTION),
				 errmsg("could not initialize libcurl")));
}

static CURLcode
add_header(Transfer *transfer, const char *header)
{
	struct curl_slist *longer = curl_slist_append(transfer->headers, header);

	if (longer == NULL)
		return CURLE_OUT_OF_MEMORY;
	transfer->headers = longer;
	return CURLE_OK;
}

#define TRY(call) \
	do { \
		CURLcode	code_ = (call); \
		if (code_ != CURLE_OK) \
			return code_; \
	} while (0)
#define SET(option, value)	TRY(curl_easy_setopt(transfer->easy, option, value))

/*
 * Says what the request is. What libcurl does not do unless it is told to
 * (redirects, cookies, .netrc, logging) is not mentioned.
 */
static CURLcode
prepare(Transfer *transfer, const char *url, List *headers,
		int connect_timeout_ms, int request_timeout_ms)
{
	ListCell   *cell;

	foreach(cell, headers)
		TRY(add_header(transfer, lfirst(cell)));
	TRY(add_header(transfer, "Expect:"));	/* would cost a round trip */

	SET(CURLOPT_PRIVATE, transfer);
	SET(CURLOPT_PROTOCOLS_STR, "http,https");
	SET(CURLOPT_URL, url);
	SET(CURLOPT_HTTP_VERSION, (long) CURL_HTTP_VERSION_1_1);
	SET(CURLOPT_SSL_VERIFYPEER, 1L);
	SET(CURLOPT_SSL_VERIFYHOST, 2L);
	/* without TLS a request stays on this machine; no variable of the environment moves it off */
	if (pg_strncasecmp(url, "https:", strlen("https:")) != 0)
		SET(CURLOPT_PROXY, "");
	SET(CURLOPT_HTTPHEADER, transfer->headers);
	SET(CURLOPT_POSTFIELDS, (void *) transfer->body);
	SET(CURLOPT_CONNECTTIMEOUT_MS, (long) connect_timeout_ms);
	SET(CURLOPT_TIMEOUT_MS, (long) request_timeout_ms);
	SET(CURLOPT_NOSIGNAL, 1L);
	SET(CURLOPT_QUICK_EXIT, 1L);	/* a time-out does not wait for the thread that resolves */
	SET(CURLOPT_WRITEFUNCTION, take_body);
	SET(CURLOPT_WRITEDATA, transfer);
	SET(CURLOPT_HEADERFUNCTION, take_header);
	SET(CURLOPT_HEADERDATA, transfer);
	return CURLE_OK;
}

/*
 * http_send
 *		Begins a POST, which goes out in the next http_wait().
 *
 * The headers are strings "Name: value" without line breaks, Content-Type
 * among them. Everything is copied but owner, which comes back in the reply.
 * The time-outs are in milliseconds and above zero; the second one is for all
 * of the request, connecting included. What is wrong with the request or the
 * network comes as a reply; an error is raised only if there is no memory.
 */
void
http_send(const char *url, List *headers, const char *body,
		  int connect_timeout_ms, int request_timeout_ms, void *owner)
{
	size_t		size = strlen(body) + 1;
	Transfer   *transfer = MemoryContextAlloc(TopMemoryContext, offsetof(Transfer, body) + size);
	CURLcode	result = CURLE_OUT_OF_MEMORY;
	sigset_t	saved;

	Assert(connect_timeout_ms > 0 && request_timeout_ms > 0);

	memset(transfer, 0, offsetof(Transfer, reply));
	memcpy(transfer->body, body, size);
	transfer->owner = owner;
	dlist_push_tail(&running, &transfer->node);
	in_flight++;

	saved = block_signals();
	transfer->easy = curl_easy_init();
	if (transfer->easy)
		result = prepare(transfer, url, headers, connect_timeout_ms, request_timeout_ms);
	if (result == CURLE_OK && curl_multi_add_handle(multi, transfer->easy) != CURLM_OK)
		result = CURLE_FAILED_INIT;
	restore_signals(saved);

	if (result != CURLE_OK)
	{
		forget(transfer);
		ereport(ERROR,
				(errcode(result == CURLE_OUT_OF_MEMORY ? ERRCODE_OUT_OF_MEMORY :
						 ERRCODE_EXTERNAL_ROUTINE_EXCEPTION),
				 errmsg("could not begin an HTTP request: %s", curl_easy_strerror(result))));
	}
}

/* Returns how many requests were sent whose replies http_next() has not given yet. */
int
http_in_flight(void)
{
	return in_flight;
}

/* Tells libcurl what has happened at a socket, or that its time has come. */
static void
proceed(curl_socket_t socket, int what)
{
	int			still_running;
	sigset_t	saved = block_signals();
	CURLMcode	result = curl_multi_socket_action(multi, socket, what, &still_running);

	restore_signals(saved);
	if (result != CURLM_OK)
		ereport(ERROR,
				(errcode(ERRCODE_EXTERNAL_ROUTINE_EXCEPTION),
				 errmsg("could not proceed with HTTP requests: %s", curl_multi_strerror(result))));
}

/* Sorts out what has ended. */
static void
collect_ended(void)
{
	CURLMsg    *message;
	int			left;

	while ((message = curl_multi_info_read(multi, &left)) != NULL)
	{
		Transfer   *transfer;

		curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, (char **) &transfer);
		transfer->result = message->data.result;
		dlist_delete(&transfer->node);
		dlist_push_tail(&ended, &transfer->node);
	}
}

/*
 * Waits for the latch, the sockets and the time; returns how many events there
 * are. The set is made anew each time: libcurl closes a socket, and opens
 * another of the same number, in one call.
 */
static int
wait_for_events(long timeout_ms, uint32 wait_event, WaitEvent *events, bool *latch_is_set)
{
	WaitEventSet *set = CreateWaitEventSet(NULL, nwatches + 2);
	volatile int n = 0;

	PG_TRY();
	{
		int			latch = AddWaitEventToSet(set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);

		AddWaitEventToSet(set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
		for (int i = 0; i < nwatches; i++)
			AddWaitEventToSet(set, watches[i].events, watches[i].socket, NULL, NULL);

		n = WaitEventSetWait(set, timeout_ms, events, MAX_EVENTS, wait_event);
		for (int i = 0; i < n; i++)
			*latch_is_set |= events[i].events == WL_LATCH_SET;
		if (*latch_is_set)
		{
			/* a latch hides the sockets; one that is always set would for ever */
			ModifyWaitEvent(set, latch, WL_LATCH_SET, NULL);
			n = WaitEventSetWait(set, 0, events, MAX_EVENTS, wait_event);
		}
	}
	PG_FINALLY();
	{
		FreeWaitEventSet(set);
	}
	PG_END_TRY();
	return n;
}

/*
 * http_wait
 *		Lets the requests proceed until the process's latch is set, one of them
 *		at least has ended, or so many milliseconds are over.
 *
 * It neither resets the latch nor processes interrupts, and ends the process
 * if the postmaster is gone. An error leaves requests that only
 * http_forget_all() ends.
 */
void
http_wait(long timeout_ms, uint32 wait_event)
{
	int64		deadline = now_us() + timeout_ms * INT64CONST(1000);
	bool		latch_is_set = false;

	while (dlist_is_empty(&ended))
	{
		WaitEvent	events[MAX_EVENTS];
		int64		wait_us = Max(Min(deadline, timer_at) - now_us(), 0);
		int			n;

		n = wait_for_events((wait_us + 999) / 1000, wait_event, events, &latch_is_set);
		for (int i = 0; i < n; i++)
			proceed(events[i].fd,
					(events[i].events & WL_SOCKET_READABLE ? CURL_CSELECT_IN : 0) |
					(events[i].events & WL_SOCKET_WRITEABLE ? CURL_CSELECT_OUT : 0));
		if (timer_at <= now_us())
		{
			timer_at = NEVER;
			proceed(CURL_SOCKET_TIMEOUT, 0);
		}
		collect_ended();
		if (latch_is_set || now_us() >= deadline)
			break;
	}
}

/*
 * http_next
 *		Takes a request that has ended, with its reply in the current memory
 *		context. Returns false if there is none.
 *
 * A reply that is cut short, too long or too late is none: its status is 0.
 * Retry-After is not told apart from none where it is zero or a time in the
 * past.
 */
bool
http_next(HttpReply *reply)
{
	Transfer   *transfer;
	long		status;
	curl_off_t	retry_after;
	curl_off_t	latency;

	if (dlist_is_empty(&ended))
		return false;
	transfer = dlist_head_element(Transfer, node, &ended);

	memset(reply, 0, sizeof(HttpReply));
	reply->owner = transfer->owner;
	reply->retry_after_ms = -1;
	curl_easy_getinfo(transfer->easy, CURLINFO_TOTAL_TIME_T, &latency);
	reply->latency_us = latency;
	if (transfer->result == CURLE_OK)
	{
		curl_easy_getinfo(transfer->easy, CURLINFO_RESPONSE_CODE, &status);
		curl_easy_getinfo(transfer->easy, CURLINFO_RETRY_AFTER, &retry_after);
		reply->status = status;
		reply->length = transfer->reply_length;
		if (retry_after > 0)
			reply->retry_after_ms = Min(retry_after, PG_INT32_MAX) * INT64CONST(1000);
	}
	else
		reply->error = pstrdup(reason(transfer));
	reply->body = palloc(reply->length + 1);
	memcpy(reply->body, transfer->reply, reply->length);
	reply->body[reply->length] = '\0';

	forget(transfer);
	return true;
}

/*
 * http_forget_all
 *		Ends all requests without replies, whether they have reached the other
 *		side or not; for a worker that recovers from an error. Connections that
 *		no request uses are kept.
 */
void
http_forget_all(void)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &running)
		forget(dlist_container(Transfer, node, iter.cur));
	dlist_foreach_modify(iter, &ended)
		forget(dlist_container(Transfer, node, iter.cur));
}
