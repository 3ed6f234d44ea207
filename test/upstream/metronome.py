#!/usr/bin/env python3
"""The reference upstream of the dialect "metronome" (DESIGN 5): it knows balances and takes usage, and lends nothing.

For tests. It listens and is controlled as schematic.py is, which says how, and takes the same options; --grace has no
meaning here. The API key is a bearer token.

Books. A customer has a balance of each credit, from which usage is charged; it may fall below zero. Usage is an event
with a quantity and a credit in its properties, both as texts, as a number would be read as a floating point number
elsewhere. It costs as there. An event is known by its transaction_id and charged once. With "cumulative" in its
properties its quantity is a running total of the customer's credit and of "mirror" there, and it is charged as far as
that is more than the highest before. An event of an unknown customer is recorded and counted as uncharged. So, at every
commit:

    for a customer   total = balance + used, and used is the sum of what its events cost

Control interface: as in schematic.py, but for

    POST   /_/balance   {company_id, credit_type_id, amount}: the customer's; amount may be below zero
    GET    /_/books     {customers, events, requests, consistent}
"""

import re
from decimal import Decimal

import schematic
from schematic import Refusal, amount_field, encode, instant_field, mistyped, object_field, text_field

ROUTES = {
    'balance': re.compile(r'/v1/contracts/customerBalances/getNetBalance'),
    'ingest': re.compile(r'/v1/ingest'),
}

SCHEMA = """
CREATE TABLE IF NOT EXISTS customer (
    customer_id TEXT, credit_type_id TEXT, total DECIMAL_TEXT, balance DECIMAL_TEXT, used DECIMAL_TEXT,
    PRIMARY KEY (customer_id, credit_type_id));
CREATE TABLE IF NOT EXISTS rate (
    event TEXT, credit_type_id TEXT, rate DECIMAL_TEXT, unit DECIMAL_TEXT,
    PRIMARY KEY (event, credit_type_id));
CREATE TABLE IF NOT EXISTS event (
    transaction_id TEXT PRIMARY KEY, customer_id TEXT, credit_type_id TEXT, event_type TEXT, properties TEXT,
    cost DECIMAL_TEXT, charged INT, duplicates INT DEFAULT 0, conflicts INT DEFAULT 0);
CREATE TABLE IF NOT EXISTS running_total (
    customer_id TEXT, credit_type_id TEXT, mirror TEXT, quantity DECIMAL_TEXT, late INT DEFAULT 0,
    PRIMARY KEY (customer_id, credit_type_id, mirror));
"""


class Books(schematic.Store):
    least = Decimal('-Infinity')

    def __init__(self, options):
        super().__init__(options.file, options.clock_offset, SCHEMA)

    def customer(self, customer_id, credit_type_id):
        return self.row('SELECT * FROM customer WHERE customer_id = ? AND credit_type_id = ?', customer_id, credit_type_id)

    def net_balance(self, body):
        found = self.customer(text_field(body, 'customer_id'), text_field(body, 'credit_type_id'))
        if not found:
            raise Refusal(404, 'there is no such customer')
        return {'data': {'balance': found['balance'], 'credit_type_id': found['credit_type_id']}}

    def ingest(self, events):
        if not events or len(events) > schematic.MAX_EVENTS:
            raise Refusal(400, f'there are no events, or more than {schematic.MAX_EVENTS}')
        for event in events:
            self.ingest_one(event)
        return b''

    def ingest_one(self, event):
        key = text_field(event, 'transaction_id')
        customer_id = text_field(event, 'customer_id')
        event_type = text_field(event, 'event_type')
        instant_field(event, 'timestamp')
        properties = object_field(event, 'properties')
        credit_type_id = text_field(properties, 'credit_type_id')
        quantity = text_field(properties, 'quantity')
        if not re.fullmatch(r'\d+(\.\d+)?', quantity):
            raise Refusal(400, 'quantity must be an amount')
        quantity = amount_field({'quantity': Decimal(quantity)}, 'quantity')
        if properties.get('cumulative') not in (None, 'true'):
            raise Refusal(400, 'cumulative must be "true"')

        known = self.row('SELECT * FROM event WHERE transaction_id = ?', key)
        if known:
            same = (known['customer_id'], known['event_type'], known['properties']) == (
                customer_id, event_type, encode(properties))
            self.db.execute('UPDATE event SET duplicates = duplicates + 1, conflicts = conflicts + ?'
                            ' WHERE transaction_id = ?', (not same, key))
            return
        payer = self.customer(customer_id, credit_type_id)
        if properties.get('cumulative'):
            quantity = self.growth(customer_id, credit_type_id, text_field(properties, 'mirror'), quantity)
        cost = self.cost(event_type, credit_type_id, quantity)
        if payer:
            self.db.execute('UPDATE customer SET balance = ?, used = ? WHERE customer_id = ? AND credit_type_id = ?',
                            (payer['balance'] - cost, payer['used'] + cost, customer_id, credit_type_id))
        self.db.execute('INSERT INTO event (transaction_id, customer_id, credit_type_id, event_type, properties, cost,'
                        ' charged) VALUES (?, ?, ?, ?, ?, ?, ?)',
                        (key, customer_id, credit_type_id, event_type, encode(properties), cost, payer is not None))

    def growth(self, customer_id, credit_type_id, mirror, quantity):
        """Returns by how much a running total is more than the highest before; one that is less is counted as late."""
        key = customer_id, credit_type_id, mirror
        known = self.row('SELECT * FROM running_total WHERE customer_id = ? AND credit_type_id = ? AND mirror = ?', *key)
        before = known['quantity'] if known else Decimal(0)
        self.db.execute('INSERT OR REPLACE INTO running_total VALUES (?, ?, ?, ?, ?)',
                        (*key, max(quantity, before), (known['late'] if known else 0) + (quantity < before)))
        return max(quantity - before, Decimal(0))

    # what the control interface asks for

    def add(self, customer_id, credit_type_id, amount):
        self.db.execute("INSERT OR IGNORE INTO customer VALUES (?, ?, '0', '0', '0')", (customer_id, credit_type_id))
        old = self.customer(customer_id, credit_type_id)
        self.db.execute('UPDATE customer SET total = ?, balance = ? WHERE customer_id = ? AND credit_type_id = ?',
                        (old['total'] + amount, old['balance'] + amount, customer_id, credit_type_id))

    def report(self):
        customers = self.rows('SELECT * FROM customer ORDER BY customer_id, credit_type_id')
        events = self.rows('SELECT * FROM event')
        used = {}
        for event in events:
            if event['charged']:
                payer = event['customer_id'], event['credit_type_id']
                used[payer] = used.get(payer, 0) + event['cost']
        return {
            'customers': customers,
            'events': {
                'accepted': len(events),
                'duplicates': sum(event['duplicates'] for event in events),
                'conflicts': sum(event['conflicts'] for event in events),
                'uncharged': sum(not event['charged'] for event in events),
                'late': sum(row['late'] for row in self.rows('SELECT late FROM running_total'))},
            'requests': {row['kind']: row['n'] for row in
                         self.rows('SELECT kind, count(*) AS n FROM request GROUP BY kind ORDER BY kind')},
            'consistent': all(c['total'] == c['balance'] + c['used']
                              and c['used'] == used.get((c['customer_id'], c['credit_type_id']), 0) for c in customers)}


class Call(schematic.Call):
    routes = ROUTES

    def keys(self, handler):
        if self.kind == 'ingest' and isinstance(self.body, list):
            self.events = [event for event in self.body if isinstance(event, dict)]
        token = handler.headers.get('Authorization', '')
        return [token.removeprefix('Bearer ') if token.startswith('Bearer ') else None]

    def slot(self):
        if self.kind == 'ingest':
            named = {event.get('customer_id') for event in self.events}
            return None, {name for name in named if isinstance(name, str)}
        subject = self.body if isinstance(self.body, dict) else {}
        customer_id = subject.get('customer_id')
        return (encode([customer_id, subject.get('credit_type_id')]),
                {customer_id} if isinstance(customer_id, str) else set())

    @staticmethod
    def error(text):
        return {'message': text}

    def carry_out(self):
        if self.kind == 'ingest':
            if not isinstance(self.body, list) or len(self.body) != len(self.events):
                raise Refusal(400, 'the body must be an array of objects')
            return self.books.ingest(self.events)
        if not isinstance(self.body, dict):
            raise Refusal(400, 'the body must be a JSON object')
        return self.books.net_balance(self.body)


class Fault(schematic.Fault):
    """Those of schematic.py that have a meaning here; what is done to a finished reply is for balances alone."""
    faults = {name: schematic.FAULTS[name] for name in (
        'slow', 'status', 'hang', 'reset', 'close', 'huge', 'redirect')} | {
        'malformed': (schematic.malformed, {'body': '{"data": {"balance": '}),
        'mistyped': (mistyped, {'field': 'balance'}),
        'negative': (mistyped, {'field': 'balance', 'value': -7}),
        'absurd': (mistyped, {'field': 'balance', 'value': Decimal('1e40')}),
        'other_credit': (mistyped, {'field': 'credit_type_id', 'value': 'another credit'}),
    }
    kinds = ROUTES


class Server(schematic.Server):
    books_class = Books
    call_class = Call
    fault_class = Fault


if __name__ == '__main__':
    schematic.main(Server, 'The reference upstream of the dialect metronome, for tests.')
