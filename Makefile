# make, make install and make installcheck are PGXS's own. make test installs what it needs from Debian's packages and
# runs everything in a throw-away copy; make test-versions does the same on other versions of PostgreSQL.

EXTENSION = credit_lease
MODULE_big = $(EXTENSION)
PGFILEDESC = "credit_lease - prepaid credits inside the application's transaction"
OBJS = $(patsubst %.c,%.o,$(sort $(wildcard src/*.c)))
DATA = $(sort $(wildcard sql/$(EXTENSION)--*.sql))

PG_CFLAGS = -Wextra -Wno-unused-parameter
SHLIB_LINK = -lcurl

# All regression tests share the database in which the first of them creates the extension.
REGRESS = install $(filter-out install,$(sort $(basename $(notdir $(wildcard test/sql/*.sql)))))
REGRESS_OPTS = --inputdir=test
ISOLATION := $(sort $(basename $(notdir $(wildcard test/specs/*.spec))))
# PGXS's own --outputdir would hide expected/ from PostgreSQL 15.
ISOLATION_OPTS = --inputdir=test --outputdir=.
PROVE_TESTS := $(sort $(wildcard test/t/*.pl))
TAP_TESTS := $(if $(PROVE_TESTS),1)

PG_CONFIG ?= pg_config
PGXS := $(wildcard $(shell $(PG_CONFIG) --pgxs 2>/dev/null))
ifneq ($(PGXS),)
include $(PGXS)
else
# make test has to work where PostgreSQL is not installed yet
all install installcheck:
	$(error no server headers by way of PG_CONFIG=$(PG_CONFIG): install postgresql-server-dev-NN, or name another pg_config)
endif

# PGXS has emptied it
PROVE_FLAGS += -I test/perl

# PGXS does not know which objects a header goes into
$(OBJS) $(OBJS:.o=.bc): $(wildcard src/*.h)

.PHONY: test test-versions demo demo-stop

test:
	test/run

test-versions:
	test/versions

demo:
	demo/run

demo-stop:
	demo/stop
