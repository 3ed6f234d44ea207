#ifndef CREDIT_LEASE_UPSTREAM_STATE_H
#define CREDIT_LEASE_UPSTREAM_STATE_H

#include "datatype/timestamp.h"
#include "utils/array.h"

extern void upstream_state_request(void);

extern void upstream_state_clear(void);
extern void upstream_state_sent(const char *server);
extern void upstream_state_succeeded(const char *server, bool reports, int64 latency_us);
extern void upstream_state_refused(const char *server, bool reports, const char *error, int64 latency_us);
extern int	upstream_state_failed(const char *server, bool reports, const char *error, TimestampTz sent_at);
extern void upstream_state_note(const char *server, const char *error);
extern void upstream_state_back_off(const char *server, bool reports, TimestampTz until);
extern void upstream_state_try_again(void);
extern ArrayType *upstream_state_backing_off(bool reports, TimestampTz now, TimestampTz *first_end);
extern TimestampTz upstream_state_backs_off_until(const char *server, char **error);

#endif							/* CREDIT_LEASE_UPSTREAM_STATE_H */
