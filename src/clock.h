#ifndef CREDIT_LEASE_CLOCK_H
#define CREDIT_LEASE_CLOCK_H

#include "datatype/timestamp.h"

extern void clock_define_settings(void);
extern TimestampTz clock_now(void);
extern bool clock_parse(const char *string, TimestampTz *instant);

#endif							/* CREDIT_LEASE_CLOCK_H */
