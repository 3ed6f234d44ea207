/*
 * ingest_price.c
 *		What events that name a feature cost, and in which credits.
 *
 * A feature that many events of an account name is looked up once.
 */
#include "postgres.h"

#include "amount.h"
#include "clock.h"
#include "ingest.h"
#include "ingest_label.h"
#include "meter.h"

/* A feature that an account has used */
typedef struct Feature
{
	int			npayers;
	Meter	   *meter;
	bool		is_free;
} Feature;

/* Reads what features cost: of each of so many, in the order of the names. */
static void
read_meters(Feature *feature, Datum *account, Datum *name, int n)
{
	int		   *which;
	Meter	   *meters;
	int			nmeters = meter_find_many(account, name, n, clock_now(), &which, &meters);

	for (int i = 0; i < nmeters; i++)
	{
		Feature    *of = &feature[which[i] - 1];

		if (of->npayers++ == 0)
			of->meter = &meters[i];
		of->is_free = meters[i].credit == NULL;
	}
}

/* Sets which credits may pay for an event, and how much; or what comes of it where none may. */
static void
price(IngestEvent *event, const Feature *feature)
{
	if (feature->npayers == 0 || feature->is_free)
	{
		event->applied = feature->is_free;
		event->reason = feature->is_free ? "free" : "not_metered";
		return;
	}
	event->payer = palloc0(sizeof(IngestPayer) * feature->npayers);
	for (int i = 0; i < feature->npayers; i++)
	{
		const Meter *meter = &feature->meter[i];
		Numeric		amount = meter_amount(event->quantity, meter->rate, meter->unit);

		if (!amount_has_too_many_digits(amount))
			event->payer[event->npayers++] = (IngestPayer) {
			.credit = meter->credit, .amount = amount, .reported_as = meter->event
		};
	}
	if (event->npayers == 0)
		event->reason = "invalid_quantity";
}

/*
 * ingest_price
 *		Prices those of some events that name a feature. Leaves those that may be
 *		paid for, in their order, and returns how many they are; of the others it
 *		is noted what comes of them.
 */
int
ingest_price(IngestEvent **event, int n)
{
	int		   *number = palloc(sizeof(int) * Max(n, 1));
	Datum	   *account = palloc(sizeof(Datum) * Max(n, 1));
	Datum	   *name = palloc(sizeof(Datum) * Max(n, 1));
	Feature    *feature;
	int			nfeatures = 0;
	int			npriced = 0;
	labels_hash *known = labels_create(CurrentMemoryContext, 64, NULL);

	for (int i = 0; i < n; i++)
	{
		LabelEntry *entry;
		bool		found;

		if (event[i]->feature == NULL)
			continue;
		entry = labels_insert(known, (Label) {event[i]->account_number, event[i]->feature}, &found);
		if (!found)
		{
			account[nfeatures] = PointerGetDatum(event[i]->account);
			name[nfeatures] = PointerGetDatum(event[i]->feature);
			entry->value = DatumGetPointer(Int32GetDatum(nfeatures++));
		}
		number[i] = DatumGetInt32(PointerGetDatum(entry->value));
	}
	if (nfeatures == 0)
		return n;

	feature = palloc0(sizeof(Feature) * nfeatures);
	read_meters(feature, account, name, nfeatures);
	for (int i = 0; i < n; i++)
	{
		if (event[i]->feature)
			price(event[i], &feature[number[i]]);
		if (event[i]->npayers > 0)
			event[npriced++] = event[i];
	}
	return npriced;
}
