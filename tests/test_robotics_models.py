"""Models from outside: good ones become MuJoCo models, hostile and broken ones are refused in a sentence before anything is compiled."""

import time
from pathlib import Path

import mujoco
import numpy as np
import pytest

from domains.robotics import models
from domains.robotics.models import Limits
from twinsim.base import BadInput

PENDULUM = """<mujoco model="pendulum"><compiler angle="radian" meshdir="parts"/>
  <asset><mesh name="bob" file="bob.obj"/></asset>
  <worldbody><include file="table.xml"/>
    <body name="arm" pos="0 0 1"><joint name="swing" axis="0 1 0" range="-1.5 1.5"/><geom type="mesh" mesh="bob"/></body>
    <replicate count="3" offset=".1 0 0"><geom size=".01" pos="0 0 .5"/></replicate>
  </worldbody></mujoco>"""
TABLE = '<mujocoinclude><geom name="table" type="plane" size="1 1 .1"/></mujocoinclude>'
TETRAHEDRON = "v 0 0 0\nv .1 0 0\nv 0 .1 0\nv 0 0 .1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"
URDF = """<robot name="two"><link name="base"/>
  <link name="tip"><inertial><mass value="2"/><inertia ixx=".1" iyy=".1" izz=".1" ixy="0" ixz="0" iyz="0"/></inertial>
    <visual><geometry><mesh filename="package://two/meshes/bob.obj"/></geometry></visual>
    <collision><geometry><mesh filename="package://two/meshes/bob.obj"/></geometry></collision></link>
  <joint name="turn" type="revolute"><parent link="base"/><child link="tip"/><axis xyz="0 0 1"/>
    <limit lower="-1" upper="1" effort="5" velocity="2"/></joint>
  <gazebo><plugin name="ros_control" filename="libgazebo_ros_control.so"/></gazebo></robot>"""


def world(inside: str, before: str = "") -> str:
    return f"<mujoco>{before}<worldbody>{inside}</worldbody></mujoco>"


def put(folder: Path, **files: str) -> Path:
    """Files by name, `__` for a slash and `_` before the ending for its dot; gives the first."""
    paths = [folder / "_".join(name.split("_")).replace("__", "/").replace("_DOT_", ".") for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return paths[0]


def test_good_mjcf_with_an_include_a_mesh_and_copies_is_a_model(tmp_path):
    path = put(tmp_path, pendulum_DOT_xml=PENDULUM, table_DOT_xml=TABLE, parts__bob_DOT_obj=TETRAHEDRON)
    opened = models.read(path)
    assert (opened.form, opened.notes) == ("MJCF", ())
    assert opened.files == ("parts/bob.obj", "pendulum.xml", "table.xml")
    assert (opened.model.njnt, opened.model.ngeom, opened.model.nmesh) == (1, 5, 1)
    np.testing.assert_allclose(opened.model.jnt_range[0], [-1.5, 1.5])


def test_good_urdf_is_a_model_and_its_gazebo_plugins_are_not_looked_at(tmp_path):
    opened = models.read(put(tmp_path, two_DOT_urdf=URDF, bob_DOT_obj=TETRAHEDRON))
    assert opened.form == "URDF" and opened.model.njnt == 1
    np.testing.assert_allclose(opened.model.jnt_range[0], [-1, 1])
    assert opened.model.body_mass.sum() == pytest.approx(2)


@pytest.mark.parametrize(("place", "told"), [("bob.obj", ""), ("parts/bob.obj", '<mujoco><compiler meshdir="parts"/></mujoco>')])
def test_urdf_has_a_mesh_beside_it_or_in_the_folder_that_it_names(tmp_path, place, told):
    text = URDF.replace("package://two/meshes/bob.obj", "bob.obj").replace('<link name="base"/>', f'{told}<link name="base"/>')
    path = put(tmp_path, two_DOT_urdf=text)
    put(tmp_path, **{place.replace("/", "__").replace(".", "_DOT_"): TETRAHEDRON})
    opened = models.read(path)
    assert opened.model.nmesh == 1 and opened.files == tuple(sorted((place, "two.urdf")))


def test_what_a_urdf_shows_is_looked_at_only_where_it_is_kept(tmp_path):
    text = URDF.replace("<visual><geometry><mesh filename", '<visual><geometry><mesh filename="file:///opt/bob.dae"/><mesh filename', 1)
    put(tmp_path, bob_DOT_obj=TETRAHEDRON)
    assert models.read(put(tmp_path, two_DOT_urdf=text)).model.nmesh == 1
    kept = text.replace("</robot>", '<mujoco><compiler discardvisual="false"/></mujoco></robot>')
    with pytest.raises(BadInput, match=r"mesh> filename: expected a file that ends in \.stl.*got 'file:///opt/bob.dae'"):
        models.read(put(tmp_path, two_DOT_urdf=kept))


def test_ranges_that_read_like_radians_are_noted(tmp_path):
    body = '<body><joint name="elbow" range="-1.57 1.57"/><geom size=".1"/></body>'
    trap = models.read(put(tmp_path, trap_DOT_xml=world(body)))
    assert trap.model.jnt_range[0, 1] == pytest.approx(np.radians(1.57))  # what MuJoCo makes of it
    assert len(trap.notes) == 1 and "elbow" in trap.notes[0] and "degrees" in trap.notes[0]
    for plain in (
        world(body, '<compiler angle="radian"/>'),
        world(body.replace("1.57", "90")),
        world(body.replace("range", 'type="slide" range')),
    ):
        assert not models.screen(put(tmp_path, plain_DOT_xml=plain)).notes


GEOM = '<geom size=".1"/>'
ASSET = '<asset><model name="part" file="part.xml"/></asset>'
HOSTILE = {
    "absolute include": (world('<include file="/etc/passwd"/>'), "include.*relative path within"),
    "include of the folder above": (world('<include file="../secret.xml"/>'), "include.*relative path within"),
    "include hidden by character codes": (world('<include file="&#46;&#46;/secret.xml"/>'), "include.*relative path within"),
    "include in capitals": (world('<INCLUDE file="/etc/passwd"/>'), "INCLUDE.*relative path within"),
    "include of itself": (world('<include file="model.xml"/>'), "do not include themselves"),
    "mesh elsewhere": (world(GEOM, '<asset><mesh file="/etc/shadow.stl"/></asset>'), "mesh.*relative path within"),
    "folder of meshes elsewhere": (world(GEOM, '<compiler meshdir="../../"/>'), "compiler> meshdir.*relative path within"),
    "library as a mesh": (world(GEOM, '<asset><mesh file="evil.so"/></asset>'), r"ends in \.stl"),
    "mesh that is not there": (world(GEOM, '<asset><mesh file="no.stl"/></asset>'), "expected the file no.stl"),
    "plugin": (world(GEOM, '<extension><plugin plugin="mujoco.pid"/></extension>'), "without plugins"),
    "copies": (world(f'<replicate count="100000000">{GEOM}</replicate>'), "replicate> count: expected at most 50,000"),
    "copies of copies": (world('<replicate count="1000">' * 3 + GEOM + "</replicate>" * 3), "at most 50,000 elements"),
    "particles": (world('<body><flexcomp type="grid" count="900 900 900"/></body>'), "flexcomp> count"),
    "height field": (world(GEOM, '<asset><hfield nrow="90000" ncol="90000" size="1 1 1 1"/></asset>'), "hfield.*cells"),
    "texture": (world(GEOM, '<asset><texture builtin="flat" width="99999" height="99999"/></asset>'), "texture.*cells"),
    "memory": (world(GEOM, '<size memory="900G"/>'), "size> memory"),
    "not a number": (world('<body pos="0 nan 0"><geom size=".1"/></body>'), "line 1: <body> pos: expected finite numbers"),
    "too large a number": (world('<geom size="1e999"/>'), "geom> size: expected finite numbers"),
    "entities": ('<!DOCTYPE m [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><mujoco model="&b;"/>', "document type definition"),
    "half a file": (PENDULUM[:60], "well-formed XML"),
    "depth": (world("<body>" * 90 + "</body>" * 90), "at most 64 elements within each other"),
    "many elements": (world(GEOM * 60_000), "at most 50,000 elements"),
    "another language": ("<sdf/>", "expected <mujoco> or <robot>"),
    "macros": ('<robot><xacro:include filename="a.xacro"/></robot>', "run xacro"),
    "what MuJoCo refuses": (world('<geom type="sphere"/>'), "expected a model that MuJoCo compiles.*size"),
    "an attribute that there is not": (world('<geom size=".1" colour="red"/>'), "MuJoCo compiles.*colour"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_or_broken_model_is_refused_at_once_in_a_sentence(tmp_path, kind):
    text, said = HOSTILE[kind]
    path = put(tmp_path, model_DOT_xml=text)
    (tmp_path.parent / "secret.xml").write_text(TABLE)
    began = time.process_time()
    with pytest.raises(BadInput, match=said) as refused:
        models.read(path)
    assert time.process_time() - began < 5 and "\n" not in str(refused.value) and str(path.parent) in str(refused.value)


def test_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.xml").write_text(TABLE)
    path = put(tmp_path / "folder", model_DOT_xml=world('<include file="table.xml"/>'))
    (tmp_path / "folder/table.xml").symlink_to(tmp_path / "secret.xml")
    with pytest.raises(BadInput, match="a link out of it"):
        models.read(path)


@pytest.mark.parametrize("kind", ["before", "after", "included"])
def test_attached_models_count_as_often_as_they_are_attached_wherever_they_are_named(tmp_path, kind):
    put(tmp_path, part_DOT_xml=world(f'<body name="b">{GEOM * 100}</body>'), asset_DOT_xml=f"<mujocoinclude>{ASSET}</mujocoinclude>")
    attach = "".join(f'<attach model="part" body="b" prefix="p{n}"/>' for n in range(20))
    named = {"before": world(attach, ASSET), "after": world(attach).replace("</mujoco>", f"{ASSET}</mujoco>")}
    path = put(tmp_path, model_DOT_xml=named.get(kind, world(attach, '<include file="asset.xml"/>')))
    assert models.screen(path).elements > 2000
    with pytest.raises(BadInput, match="at most 1,000 elements"):
        models.screen(path, Limits(elements=1000))


def test_models_that_only_name_one_another_are_counted_too(tmp_path):
    put(tmp_path, part_DOT_xml=world(GEOM * 100))
    many = "".join(f'<model name="m{n}" file="part.xml"/>' for n in range(20))
    with pytest.raises(BadInput, match="at most 1,000 elements"):
        models.screen(put(tmp_path, model_DOT_xml=f"<mujoco><asset>{many}</asset></mujoco>"), Limits(elements=1000))


def test_meshes_are_told_by_where_the_spec_names_them_those_of_attached_models_too(tmp_path):
    part = world('<body name="b"><geom type="mesh" mesh="m"/></body>', '<asset><mesh name="m" file="m.obj"/></asset>')
    text = PENDULUM.replace("<asset>", '<asset><model name="part" file="part/part.xml"/>').replace(
        "</worldbody>", '<attach model="part" body="b" prefix="p"/></worldbody>'
    )
    path = put(tmp_path, main_DOT_xml=text, table_DOT_xml=TABLE, parts__bob_DOT_obj=TETRAHEDRON)
    put(tmp_path, part__part_DOT_xml=part, part__m_DOT_obj=TETRAHEDRON)
    opened, out = models.read(path), tmp_path / "out"
    put(out, scene_DOT_xml=opened.spec().to_xml())
    for name, file in opened.assets().items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(file.read_bytes())
    assert mujoco.MjModel.from_xml_path(str(out / "scene.xml")).nmesh == 2


@pytest.mark.parametrize("places", [["q.xml"], ["sub/q.xml"], ["q.xml", "sub/q.xml"]])
def test_files_included_by_included_ones_are_where_mujoco_looks(tmp_path, places):
    """In the folder of the first file, else beside the one that names them."""
    path = put(tmp_path, main_DOT_xml='<mujoco><include file="sub/p.xml"/></mujoco>')
    put(tmp_path, sub__p_DOT_xml='<mujocoinclude><include file="q.xml"/></mujocoinclude>')
    for place in places:
        (tmp_path / place).write_text(f'<mujocoinclude><worldbody><geom name="{place}" size=".1"/></worldbody></mujocoinclude>')
    assert models.read(path).model.geom(0).name == places[0]


def test_compiler_that_takes_too_much_is_stopped_and_this_process_lives(tmp_path):
    bodies = "".join(f'<body pos="{n} 0 0"><freejoint/>{GEOM}</body>' for n in range(4000))
    with pytest.raises(BadInput, match="within 1 s of CPU|MuJoCo compiles"):
        models.read(put(tmp_path, model_DOT_xml=world(bodies)), Limits(cpu=1, memory=600_000_000))


@pytest.mark.parametrize(
    ("name", "limits"), [("big.xml", Limits(xml_bytes=10)), ("model.mjb", models.LIMITS), ("absent.xml", models.LIMITS)]
)
def test_file_of_another_kind_or_size_is_refused(tmp_path, name, limits):
    put(tmp_path, big_DOT_xml=world(GEOM), model_DOT_mjb="")
    with pytest.raises(BadInput, match="expected"):
        models.read(tmp_path / name, limits)
