"""The web console under ``/ui``: pages rendered on the server, parts of which htmx changes.

A screen is a module with its ``PAGES``, listed in ``web/console/screens.py``, and templates in ``templates/console``::

    PAGES = Pages()

    class EndForm(RequestModel):
        reason: Literal["lost", "sold"]

    @PAGES.add("GET", "/ui/things/{thing_id}", Permission.READ)
    def thing(visit: Visit, thing_id: str) -> Shown:
        found = visit.portal.things.get(visit.actor.tenant_id, thing_id)      # a use case; raises what it means
        return Shown("thing.html", {"thing": found}, fragment="thing_body.html")

    @PAGES.add("POST", "/ui/things/{thing_id}/end", Permission.CHANGE)
    def end(visit: Visit, thing_id: str) -> Moved | Shown:
        try:
            form = visit.form(EndForm)
        except InputInvalid as error:                                         # the form again, with what is wrong
            return Shown("thing.html", {..., "problems": {one.field: one.message for one in error.errors}}, status=422)
        visit.portal.things.end(visit.actor, thing_id, form.reason)
        return Moved(f"/ui/things/{thing_id}")                                # after each change: never a page itself

What the frame does, so that no screen has to: session, tenant, permission, the form's token and the origin of each
request that is not a GET, the patterns of the parts of a path (``web/api/routing.py:PATH_PARTS``), headers, errors as
pages or as a notice for htmx, the way to the login and back. What a screen must do:

- take the tenant from ``visit.actor.tenant_id``, and call use cases of ``workflows`` alone: no SQL, no HTTP to itself;
- make each form that changes something with the macro ``form`` or ``confirm``, which carry the form's token; requests
  of htmx bring it along as a header by themselves;
- show what somebody has stored by the macro ``stored``, and times by ``time`` or ``ago``;
- ask ``visit.may(Permission.…)`` in the template before it shows the way to something;
- have a state for nothing there (the macro ``empty``) that says what to do next, and a way back (``crumbs``);
- give each ``td`` of a table a ``data-label``, its name on a phone, and the first ``cell-lead``;
- read at most a page of rows, by the cursors of the use case: nothing whose cost grows with the fleet;
- have a line in ``tests/system/test_console.py:SCREENS``, by which a browser and axe-core look at it;
- write no style and no script into a page: the policy forbids both. Looks are classes of ``static/console.css``.
"""
